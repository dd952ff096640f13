from .datamodule import ShardDataModule as ShardDataModule
from .dataset_folder import DatasetFolder as DatasetFolder
from .dataset_folder import DatasetPart as DatasetPart
from .duplication_plan import DuplicationPlan as DuplicationPlan
from .options import StreamOptions as StreamOptions
from .split import PartSizes as PartSizes
