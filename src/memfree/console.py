"""A console for lines and tables that hold names of others: files, keys, folders."""

from __future__ import annotations

from rich.console import Console


def plain_console(stderr: bool = False) -> Console:
    """A console that shows text as it is: ``[bold]`` is no style and ``:cat:`` no picture.

    Args:
        stderr: write to standard error.
    """
    return Console(stderr=stderr, markup=False, emoji=False)
