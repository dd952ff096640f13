"""Sources, declared duplication, dataset folders and the streams that training reads."""

from memfree.data.folder import DatasetFolder, DatasetPart
from memfree.data.plan import DuplicationPlan
from memfree.data.prepare import prepare
from memfree.data.split import PartSizes

__all__ = ["DatasetFolder", "DatasetPart", "DuplicationPlan", "PartSizes", "prepare"]
