"""What the pictures of a study have in common: colours, intervals, axes, saving."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from memfree.evaluation.intervals import Interval
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.folders.atomic_files import write_atomic
from memfree.study.values import ORACLES

_LONG = 28  # characters of a name that has a row of its own
_GREY = dict(zip(ORACLES, ("#444444", "#999999"), strict=True))


def colours(names: Iterable[Any]) -> dict[Any, str]:
    """A colour a name, in order, and grey for oracles.

    They are those of the report, or a larger set where those do not suffice.
    """
    named = [name for name in dict.fromkeys(names) if name not in _GREY]
    palette: Sequence[str] = PRINTED_COLOURS
    if len(named) > len(palette):
        many = matplotlib.colormaps["tab20"]
        palette = [to_hex(many(number)) for number in range(many.N)]
    return {name: palette[number % len(palette)] for number, name in enumerate(named)} | _GREY


def subject_name(subject: str) -> str:
    """A subject as a legend names it."""
    return f"oracle, equal {ORACLES[subject]}" if subject in ORACLES else subject


def line_names(lines: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Models and subjects as a legend names them: without what they all have in common."""
    named = {line: (line[0], subject_name(line[1])) for line in lines}
    models, subjects = ({name[part] for name in named.values()} for part in (0, 1))
    if len(models) == 1:
        return {line: subject for line, (_, subject) in named.items()}
    parts = 1 if len(subjects) == 1 else 2
    return {line: ", ".join(name[:parts]) for line, name in named.items()}


def error(found: Sequence[Interval], scale: float = 1.0) -> list[list[float]]:
    """Lengths of error bars, (2, figures): 0 where a figure has no interval."""
    low = [one.value if one.low is None else one.low for one in found]
    high = [one.value if one.high is None else one.high for one in found]
    return [
        [scale * max(one.value - end, 0.0) for one, end in zip(found, low, strict=True)],
        [scale * max(end - one.value, 0.0) for one, end in zip(found, high, strict=True)],
    ]


def dots(
    axes: Any, at: Sequence[float], found: Sequence[Interval], colour: str, scale: float = 1.0
) -> None:
    """Draw figures with their 95 % intervals."""
    axes.errorbar(
        at,
        [scale * one.value for one in found],
        yerr=error(found, scale),
        fmt="o",
        color=colour,
        markersize=4,
        capsize=2,
        linewidth=1,
    )


def doubling_axis(axes: Any, values: Iterable[float], label: str) -> None:
    """A horizontal axis in log2 with a tick at each value that was tried."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{one:g}" for one in ticks], fontsize=8 if len(ticks) > 7 else 10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def percent_axis(axes: Any) -> None:
    """A vertical axis for shares in per cent."""
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share of samples, %")


def distance_axis(axes: Any, values: Sequence[float]) -> None:
    """A vertical axis for Fréchet distances: in log, with numbers that can be read."""
    if not values or min(values) <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.2, max(values) * 1.2)  # an interval may reach down to 0
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    # Within one power of ten there may be no number at all.
    few = max(values) / min(values) < 12
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if few else NullFormatter())
    axes.tick_params(axis="y", which="both", labelsize=8)


def legend(axes: Any, heading: str = "", columns: int = 1) -> int:
    """A legend below the axes, which hides nothing there, in a subfigure of its own; its rows."""
    handles, names = axes.get_legend_handles_labels()
    if max(map(len, names)) > _LONG:
        columns = 1
    axes.figure.legend(
        handles=handles,
        labels=names,
        loc="outside lower center",
        title=heading or None,
        ncols=columns,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    return math.ceil(len(names) / columns) + bool(heading)


def title(axes: Any, text: str) -> None:
    """A title on the left, and no frame above and to the right."""
    axes.set_title(text, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
