from .loop import Result as Result
from .loop import sample as sample
from .module import SampleBatch as SampleBatch
from .module import SampleIndices as SampleIndices
from .module import SamplingModule as SamplingModule
from .sample_folder import SampleFolder as SampleFolder
from .sample_run import SampleRun as SampleRun
from .writer import SampleWriter as SampleWriter
