"""The progress bar of commands that count what they do."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def counting_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar for each task: its description, how many of how many, the time left, more columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
    )
