"""Commands as SLURM jobs, written and submitted by submitit."""

from memfree.slurm.command_line import main
from memfree.slurm.options import SlurmOptions
from memfree.slurm.submission import Submission

__all__ = ["SlurmOptions", "Submission", "main"]
