"""Sources, declared duplication, dataset folders and the streams that training reads."""

from memfree.data.datamodule import ShardDataModule
from memfree.data.exposures import ExposureCounter
from memfree.data.folder import DatasetFolder, DatasetPart
from memfree.data.foreign import StreamOptions
from memfree.data.plan import DuplicationPlan
from memfree.data.prepare import prepare
from memfree.data.split import PartSizes

__all__ = [
    "DatasetFolder",
    "DatasetPart",
    "DuplicationPlan",
    "ExposureCounter",
    "PartSizes",
    "ShardDataModule",
    "StreamOptions",
    "prepare",
]
