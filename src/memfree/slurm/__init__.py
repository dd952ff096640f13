"""Slurm and other launchers: which process this is, and requeueing."""

from typing import Any

from memfree import with_moved_names


def _absent(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__getattr__ = with_moved_names(
    __name__,
    _absent,
    {
        "SlurmOptions": "memfree.commands.submit",
        "Submission": "memfree.commands.submit",
        "main": "memfree.commands.submit",
    },
)
