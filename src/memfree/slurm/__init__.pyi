from .command_line import main as main
from .options import SlurmOptions as SlurmOptions
from .submission import Submission as Submission
