"""Slurm and other launchers: which process this is, and requeueing."""

from memfree import with_moved_names

__getattr__ = with_moved_names(
    __name__,
    None,
    {
        "SlurmOptions": "memfree.commands.submit",
        "Submission": "memfree.commands.submit",
        "main": "memfree.commands.submit",
    },
)
