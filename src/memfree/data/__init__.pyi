from .datamodule import ShardDataModule as ShardDataModule
from .exposures import ExposureCounter as ExposureCounter
from .folder import DatasetFolder as DatasetFolder
from .folder import DatasetPart as DatasetPart
from .options import StreamOptions as StreamOptions
from .plan import DuplicationPlan as DuplicationPlan
from .prepare import prepare as prepare
from .split import PartSizes as PartSizes
