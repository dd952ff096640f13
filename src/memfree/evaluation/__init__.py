"""Memorization metrics, quality metrics, and the report."""

from memfree.evaluation.audit import audit
from memfree.evaluation.evaluate import evaluate
from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.metrics import Metric, MetricTable, read_metrics
from memfree.evaluation.report import report

__all__ = [
    "EvaluationFolder",
    "Metric",
    "MetricTable",
    "audit",
    "evaluate",
    "read_metrics",
    "report",
]
