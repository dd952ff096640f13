"""Memorization metrics, quality metrics, and the report."""

from memfree.evaluation.evaluate import evaluate
from memfree.evaluation.finished import EvaluationFolder
from memfree.evaluation.records import Metric, MetricTable, read_metrics
from memfree.evaluation.report import report

__all__ = ["EvaluationFolder", "Metric", "MetricTable", "evaluate", "read_metrics", "report"]
