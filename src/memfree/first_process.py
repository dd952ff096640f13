"""Whether this process is the one that writes what several write once."""

from __future__ import annotations

from memfree.launcher import launched


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started.

    Raises:
        ValueError: a variable of a launcher is not a number, or too large.
    """
    return launched().rank == 0
