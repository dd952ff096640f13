from .folder import EvaluationFolder as EvaluationFolder
from .metrics import Metric as Metric
from .metrics import MetricTable as MetricTable
from .metrics import read_metrics as read_metrics
