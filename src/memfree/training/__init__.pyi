from .callbacks import ExponentialMovingAverage as ExponentialMovingAverage
from .callbacks import ExposureCounter as ExposureCounter
from .callbacks import FiniteTraining as FiniteTraining
from .callbacks import SampleGrid as SampleGrid
from .checkpoints import Checkpoints as Checkpoints
from .checkpoints import Preemption as Preemption
