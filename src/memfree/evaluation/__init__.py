"""Memorization metrics, quality metrics, and the report."""

from memfree.evaluation.evaluate import evaluate
from memfree.evaluation.records import Metric, MetricTable, read_metrics

__all__ = ["Metric", "MetricTable", "evaluate", "read_metrics"]
