"""Curves of a study, drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from memfree.evaluation.intervals import Interval
from memfree.evaluation.metrics import HELDOUT
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.folders.atomic import write_atomic
from memfree.study.grid import LADDER, ORACLES, cell_title
from memfree.study.metrics_shown import (
    DISTANCES,
    RATES,
    RATIO,
    Values,
    amount_over_seeds,
    cells_of,
    rate_over_seeds,
    subjects_of,
)
from memfree.study.summary import MEMORIZED, Line, Point, Summary, rates_by_factor

_LONG = 28  # characters of a name that has a row of its own
_GREY = dict(zip(ORACLES, ("#444444", "#999999"), strict=True))
QUALITY = "frechet_pixels"
"""Metric of the vertical axis against copies."""
PANELS = ("copies", "duplicated_share", QUALITY)
"""Metrics of the picture against the oracle."""
MARKERS = "os^Dvpx*"
"""A marker a model, where a panel has several."""


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def title(axes: Any, text: str) -> None:
    """A title on the left, and no frame above and to the right."""
    axes.set_title(text, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(names: Iterable[Any]) -> dict[Any, str]:
    """A colour a name, in order: the report's, or a larger set where those do not suffice."""
    named = [name for name in dict.fromkeys(names) if name not in _GREY]
    palette: Sequence[str] = PRINTED_COLOURS
    if len(named) > len(palette):
        many = matplotlib.colormaps["tab20"]
        palette = [to_hex(many(number)) for number in range(many.N)]
    return {name: palette[number % len(palette)] for number, name in enumerate(named)} | _GREY


def _subject_name(subject: str) -> str:
    return f"oracle, equal {ORACLES[subject]}" if subject in ORACLES else subject


def _line_names(lines: Iterable[Line]) -> dict[Line, str]:
    """Models and subjects as a legend names them: without what they all have in common."""
    named = {line: (line[0], _subject_name(line[1])) for line in lines}
    models, subjects = ({name[part] for name in named.values()} for part in (0, 1))
    if len(models) == 1:
        return {line: subject for line, (_, subject) in named.items()}
    parts = 1 if len(subjects) == 1 else 2
    return {line: ", ".join(name[:parts]) for line, name in named.items()}


def _error(intervals: Sequence[Interval], scale: float = 1.0) -> list[list[float]]:
    """Lengths of error bars, (2, n): 0 where there is no interval."""
    ends = [
        (one.value if one.low is None else one.low, one.value if one.high is None else one.high)
        for one in intervals
    ]
    pairs = list(zip(intervals, ends, strict=True))
    return [
        [scale * max(one.value - low, 0.0) for one, (low, _) in pairs],
        [scale * max(high - one.value, 0.0) for one, (_, high) in pairs],
    ]


def _dots(
    axes: Any, at: Sequence[float], means: Sequence[Interval], colour: str, scale: float = 1.0
) -> None:
    """Draw means with their 95 % intervals."""
    axes.errorbar(
        at,
        [scale * mean.value for mean in means],
        yerr=_error(means, scale),
        fmt="o",
        color=colour,
        markersize=4,
        capsize=2,
        linewidth=1,
    )


def _doubling_axis(axes: Any, values: Iterable[float], label: str) -> None:
    """A horizontal axis in log2 with a tick at each value that was tried."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8 if len(ticks) > 7 else 10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _percent_axis(axes: Any) -> None:
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share of samples, %")


def _distance_axis(axes: Any, values: Sequence[float]) -> None:
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


def _legend(axes: Any, heading: str, columns: int = 1) -> int:
    """A legend below the axes, in a subfigure of its own; the number of its rows."""
    handles, names = axes.get_legend_handles_labels()
    if max(map(len, names)) > _LONG:
        columns = 1
    axes.figure.legend(
        handles=handles,
        labels=names,
        loc="outside lower center",
        title=heading,
        ncols=columns,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    return math.ceil(len(names) / columns) + 1


def write_against_oracle(path: Path, values: Values) -> str:
    """Write a PNG with a row a model and a panel a metric, of models that have an oracle.

    Lines are means over training seeds, dots single seeds.

    Returns:
        What it shows; empty where no model has an oracle and two factors, and nothing is written.
    """
    rows = {}
    for model in dict.fromkeys(key[0] for key in values if key[2] in ORACLES):
        factors = [f for label, f in cells_of(values) if label == model and f != LADDER]
        if len(factors) > 1:
            rows[model] = factors
    if not rows:
        return ""
    figure = Figure(figsize=(11, 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for line, (model, factors) in zip(grid, rows.items(), strict=True):
        for axes, metric in zip(line, PANELS, strict=True):
            name = {**RATES, **DISTANCES}[metric].removesuffix(", %")
            title(axes, name if len(rows) == 1 else f"{model}: {name}")
            _against_oracle(axes, values, model, factors, metric)
    drawn: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        drawn |= dict(zip(names, handles, strict=True))
    figure.legend(handles=drawn.values(), labels=drawn, loc="outside right upper", frameon=False)
    save(figure, path)
    return (
        "copies, the share of samples nearest to a repeated image, and the Fréchet distance, each "
        "against the records of a repeated image"
    )


def _against_oracle(axes: Any, values: Values, model: str, factors: list[int], metric: str) -> None:
    subjects = dict.fromkeys(name for f in factors for name in subjects_of(values, model, f))
    scale = 100 if metric in RATES else 1
    drawn = []
    for subject, colour in _colours(name for name in subjects if name != HELDOUT).items():
        known = {
            factor: [scale * one.value for one in values[key].values()]
            for factor in factors
            if (key := (model, factor, subject, metric)) in values
        }
        if not known:
            continue
        means = [sum(each) / len(each) for each in known.values()]
        style = "--" if subject in ORACLES else "-"
        axes.plot([*known], means, style, color=colour, lw=1.5, label=_subject_name(subject))
        for factor, each in known.items():  # a dot a training seed
            axes.plot([factor] * len(each), each, ".", color=colour, markersize=5, alpha=0.6)
            drawn += each
    _doubling_axis(axes, factors, "records of a repeated image")
    if metric in RATES:
        _percent_axis(axes)
    else:
        _distance_axis(axes, drawn)


def write_curves(path: Path, summary: Summary) -> str:
    """Write a PNG with a panel for each thing that the study varied.

    Returns:
        What it shows; empty where there is nothing to draw, and nothing is written.
    """
    doses, ladders, sizes = summary.doses(), summary.ladders(), summary.sizes()
    only_models = not (doses or ladders or sizes) and len(cells_of(summary.values)) > 1
    # Whether the study has it, what it shows, and what draws it and returns its legend's rows.
    candidates: list[tuple[Any, str, Callable[[Any, Summary], int]]] = [
        (summary.per_image(), "copies of one image among all samples", _per_image),
        (ladders, "copies among samples nearest to such an image", _ladders),
        (doses, "samples that are copies", _doses),
        (sizes, "samples with d1/d2 < 1/3", _sizes),
        (only_models, "memorized samples", _models),
        (_fronts(summary), "quality against copies", _front),
    ]
    panels = [(text, draw) for present, text, draw in candidates if present]
    if not panels:
        return ""
    figure = Figure(layout="constrained")
    parts = figure.subfigures(1, len(panels), squeeze=False)[0]  # each with a legend of its own
    rows = 0
    for part, (text, draw) in zip(parts, panels, strict=True):
        axes = part.subplots()
        title(axes, text)
        rows = max(rows, draw(axes, summary))
    figure.set_size_inches(4.8 * len(panels), 4.0 + 0.18 * rows)
    save(figure, path)
    return "; ".join(text for text, _ in panels)


def _means(summary: Summary, what: str = "") -> str:
    """What is drawn: means with intervals, or the numbers of the only training seed."""
    drawn = ["one training seed" if summary.one_seed else "means over training seeds", what]
    drawn.append("no intervals" if summary.one_seed else "95 % intervals")
    return ", ".join(part for part in drawn if part)


def _per_image(axes: Any, summary: Summary) -> int:
    lines = summary.per_image()
    names, colours = _line_names(lines), _colours(lines)
    for line, curve in lines.items():
        means = [amount_over_seeds([*by_seed.values()]) for by_seed in curve.values()]
        values = [mean.value for mean in means]
        axes.plot([*curve], values, "-", color=colours[line], lw=1.3, label=names[line])
        _dots(axes, [*curve], means, colours[line])
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_ylabel("copies of an image")
    _doubling_axis(axes, (f for curve in lines.values() for f in curve), "records of the image")
    return _legend(axes, _means(summary))


def _ladders(axes: Any, summary: Summary) -> int:
    return _responses(axes, summary, summary.ladders(), "records of the nearest training image")


def _doses(axes: Any, summary: Summary) -> int:
    return _responses(axes, summary, summary.doses(), "records of a repeated image")


def _responses(axes: Any, summary: Summary, lines: dict[Line, list[Point]], dose: str) -> int:
    """Share of copies against the factor, the fitted curve, and the intervals of both."""
    fits = summary.fits()
    names, colours = _line_names(lines), _colours(lines)
    for line, points in lines.items():
        by_factor, colour = rates_by_factor(points), colours[line]
        factors = [*by_factor]
        _dots(axes, factors, [rate_over_seeds(each) for each in by_factor.values()], colour, 100)
        fit, name = fits[line], names[line]
        if fit is None:
            name = f"{name} (no fit)"
        else:
            x = np.geomspace(factors[0], factors[-1], 200)
            axes.plot(x, 100 * fit.rate(x), "-", color=colour, linewidth=1.3)
            if (band := fit.band(x)) is not None:
                low, high = band
                axes.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        axes.plot([], [], "o" if fit is None else "o-", color=colour, ms=4, label=name)
    _percent_axis(axes)
    _doubling_axis(axes, (point.factor for points in lines.values() for point in points), dose)
    return _legend(axes, _means(summary, "logistic fit a seed"))


def _sizes(axes: Any, summary: Summary) -> int:
    """Share with d_1/d_2 < 1/3 against the number of training images, and where it is 90 %."""
    lines, capacities = summary.sizes(), summary.capacities()
    names, colours = _line_names(lines), _colours(lines)
    for line, curve in lines.items():
        means = [rate_over_seeds([*by_seed.values()]) for by_seed in curve.values()]
        label = f"{names[line]} (EMM {capacities[line].text})"
        shares = [100 * mean.value for mean in means]
        axes.plot([*curve], shares, "-", color=colours[line], linewidth=1.3, label=label)
        _dots(axes, [*curve], means, colours[line], 100)
    memorized = 100 * MEMORIZED
    axes.axhline(memorized, color="#777777", ls=":", lw=1, label=f"memorized: {memorized:g} %")
    _percent_axis(axes)
    _doubling_axis(axes, (size for curve in lines.values() for size in curve), "training images")
    return _legend(axes, _means(summary))


def _models(axes: Any, summary: Summary) -> int:
    """Bars of both measures of memorization, a group a model."""
    cells = cells_of(summary.values)
    reference = subjects_of(summary.values, *cells[0])[0]
    measures = {"copies": "copies", RATIO: "d1/d2 < 1/3"}
    colours = _colours(measures)
    for number, (metric, name) in enumerate(measures.items()):
        known = {
            place + 0.4 * number - 0.2: rate_over_seeds([*measured.values()])
            for place, cell in enumerate(cells)
            if (measured := summary.values.get((*cell, reference, metric)))
        }
        axes.bar(
            [*known],
            [100 * mean.value for mean in known.values()],
            0.38,
            yerr=_error([*known.values()], 100),
            color=colours[metric],
            capsize=3,
            label=name,
        )
    repeated = any(factor > 1 for _, factor in cells)
    titles = [cell_title(*cell) if repeated else cell[0] for cell in cells]
    axes.set_xticks(
        range(len(cells)),
        [text.replace(", ", "\n") for text in titles],
        fontsize=8,
        rotation=30 if len(cells) > 4 else 0,
    )
    _percent_axis(axes)
    return _legend(axes, f"{reference}, {_means(summary)}", columns=2)


def _fronts(summary: Summary) -> dict[tuple[str, int], list[str]]:
    """Cells with several subjects whose copies and quality are known."""
    fronts = {}
    for cell in cells_of(summary.values):
        subjects = [
            subject
            for subject in subjects_of(summary.values, *cell)
            if subject != HELDOUT and (*cell, subject, QUALITY) in summary.values
        ]
        if len(subjects) > 1:
            fronts[cell] = subjects
    return fronts


def _front(axes: Any, summary: Summary) -> int:
    """Copies against quality: a colour a subject, a marker a model, better to the lower left."""
    fronts = _fronts(summary)
    subjects = dict.fromkeys(subject for front in fronts.values() for subject in front)
    colours = _colours(subjects)
    drawn = []
    for number, ((label, factor), front) in enumerate(fronts.items()):
        for subject in front:
            copies = rate_over_seeds([*summary.values[label, factor, subject, "copies"].values()])
            quality = amount_over_seeds([*summary.values[label, factor, subject, QUALITY].values()])
            drawn.append(quality.value)
            axes.errorbar(
                [100 * copies.value],
                [quality.value],
                xerr=_error([copies], 100),
                yerr=_error([quality]),
                fmt=MARKERS[number % len(MARKERS)],
                color=colours[subject],
                markersize=6,
                elinewidth=0.8,
            )
    for subject in subjects:
        axes.plot([], [], "o", color=colours[subject], label=_subject_name(subject))
    for number, cell in enumerate(fronts if len(fronts) > 1 else []):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot([], [], marker, color="#777777", ls="", label=cell_title(*cell))
    _distance_axis(axes, drawn)
    axes.set_xlim(left=-3)
    axes.set_xlabel("copies, %")
    axes.set_ylabel(f"{DISTANCES[QUALITY]} (lower is better)")
    return _legend(axes, _means(summary), columns=2)
