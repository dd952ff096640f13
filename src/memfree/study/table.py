"""One table of results: as Markdown, and how figures stand in it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from memfree.evaluation.intervals import Interval

_WIDTH = 96


class Bold(str):
    """The text of a figure that meets its goal."""


@dataclass(frozen=True)
class ResultTable:
    """A table with its heading and what there is to know about it."""

    heading: str
    titles: Sequence[str]
    """Of the columns."""
    rows: Sequence[Sequence[str]]
    """As wide as ``titles``; :class:`Bold` where a figure stands out."""
    text: str = ""
    """One paragraph."""

    def as_markdown(self) -> str:
        """The table below its heading, with an empty line at the end."""
        text = [textwrap.fill(self.text, _WIDTH), ""] if self.text else []
        rule = "|---" * len(self.titles) + "|"
        rows = [_line([*map(_markdown, row)]) for row in self.rows]
        return "\n".join([f"### {self.heading}", "", *text, _line(self.titles), rule, *rows, ""])


def figure_text(found: Interval, form: str = ".3g", scale: float = 1.0) -> str:
    """A figure with its interval in parentheses, where it has one.

    Args:
        found: the figure.
        form: a format of Python.
        scale: what it is multiplied by, 100 for per cent.
    """
    value = _formatted(scale * found.value, form)
    if found.low is None or found.high is None:
        return value
    low, high = (_formatted(scale * end, form) for end in (found.low, found.high))
    return f"{value} ({low}–{high})"


def percent_text(found: Interval) -> str:
    """A rate in per cent with its interval."""
    return figure_text(found, ".1f", 100)


def _formatted(value: float, form: str) -> str:
    return f"{value:{form}}".rstrip(".")  # "#.3g" leaves a point behind three digits


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(cell: str) -> str:
    return f"**{cell}**" if isinstance(cell, Bold) else cell
