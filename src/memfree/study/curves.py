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
from memfree.study.grid import LADDER, cell_title
from memfree.study.metrics_shown import (
    DISTANCES,
    ORACLES,
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


PANELS = ("copies", "duplicated_share", "frechet_pixels")
_SHOWS = (
    "copies, the share of samples nearest to a repeated image, and the Fréchet distance, each "
    "against the records of a repeated image"
)


def write_against_oracle(path: Path, values: Values) -> str:
    """Write a PNG with a row a model and a panel a metric, of models that have an oracle.

    Lines are means over training seeds, dots single seeds.

    Args:
        path: the file.
        values: what was measured, by key and training seed.

    Returns:
        What it shows; empty where no model has an oracle and two factors, and nothing is written.
    """
    rows = {}
    for model in dict.fromkeys(key[0] for key in values if key[2] in ORACLES):
        factors = [factor for label, factor in cells_of(values) if label == model]
        factors = [factor for factor in factors if factor != LADDER]
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
            _panel(axes, values, model, factors, metric)
    drawn: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        drawn |= dict(zip(names, handles, strict=True))
    figure.legend(handles=drawn.values(), labels=drawn, loc="outside right upper", frameon=False)
    save(figure, path)
    return _SHOWS


def _panel(axes: Any, values: Values, model: str, factors: list[int], metric: str) -> None:
    subjects = dict.fromkeys(one for f in factors for one in subjects_of(values, model, f))
    coloured = colours(one for one in subjects if one != HELDOUT)
    scale = 100 if metric in RATES else 1
    drawn = []
    for subject, colour in coloured.items():
        known = {
            factor: [scale * one.value for one in values[key].values()]
            for factor in factors
            if (key := (model, factor, subject, metric)) in values
        }
        if not known:
            continue
        means = [sum(each) / len(each) for each in known.values()]
        style = "--" if subject in ORACLES else "-"
        axes.plot([*known], means, style, color=colour, linewidth=1.5, label=subject_name(subject))
        for factor, each in known.items():  # a dot a training seed
            axes.plot([factor] * len(each), each, ".", color=colour, markersize=5, alpha=0.6)
            drawn += each
    doubling_axis(axes, factors, "records of a repeated image")
    if metric in RATES:
        percent_axis(axes)
    else:
        distance_axis(axes, drawn)


QUALITY = "frechet_pixels"
"""Metric of the vertical axis against copies."""
MARKERS = "os^Dvpx*"
"""A marker a model, where a panel has several."""
_WIDTH = 4.8

Panel = tuple[str, Callable[[Any, Summary], int]]
"""What it shows, and what draws it and returns the rows of its legend."""


def write_curves(path: Path, summary: Summary) -> str:
    """Write a PNG with a panel for each thing that the study varied.

    Returns:
        What it shows; empty where there is nothing to draw, and nothing is written.
    """
    panels = _panels(summary)
    if not panels:
        return ""
    figure = Figure(layout="constrained")
    rows = 0
    for part, (text, draw) in zip(_parts(figure, len(panels)), panels, strict=True):
        axes = part.subplots()
        title(axes, text)
        rows = max(rows, draw(axes, summary))
    figure.set_size_inches(_WIDTH * len(panels), 4.0 + 0.18 * rows)
    save(figure, path)
    return "; ".join(text for text, _ in panels)


def _parts(figure: Figure, number: int) -> Any:
    """Subfigures beside each other, each with axes and a legend of its own."""
    return figure.subfigures(1, number, squeeze=False)[0]


def _panels(summary: Summary) -> list[Panel]:
    panels: list[Panel] = []
    if summary.per_image():
        panels.append(("copies of one image among all samples", _per_image))
    if summary.ladders():
        panels.append(("copies among samples nearest to such an image", _ladders))
    if summary.doses():
        panels.append(("samples that are copies", _doses))
    if summary.sizes():
        panels.append(("samples with d1/d2 < 1/3", _sizes))
    elif not summary.doses() and not summary.ladders() and len(cells_of(summary.values)) > 1:
        panels.append(("memorized samples", _models))
    if _fronts(summary):
        panels.append(("quality against copies", _front))
    return panels


def _means(summary: Summary, what: str = "") -> str:
    """What is drawn: means with intervals, or the figures of the only training seed."""
    drawn = ["one training seed" if summary.one_seed else "means over training seeds", what]
    drawn.append("no intervals" if summary.one_seed else "95 % intervals")
    return ", ".join(part for part in drawn if part)


def _per_image(axes: Any, summary: Summary) -> int:
    """Copies of an image against its records: means over training seeds."""
    lines = summary.per_image()
    names, coloured = line_names(lines), colours(lines)
    for line, by_factor in lines.items():
        found = [amount_over_seeds([*seeds.values()]) for seeds in by_factor.values()]
        means = [one.value for one in found]
        axes.plot([*by_factor], means, "-", color=coloured[line], lw=1.3, label=names[line])
        dots(axes, [*by_factor], found, coloured[line])
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_ylabel("copies of an image")
    doubling_axis(axes, (f for of in lines.values() for f in of), "records of the image")
    return legend(axes, _means(summary))


def _ladders(axes: Any, summary: Summary) -> int:
    return _responses(axes, summary, summary.ladders(), "records of the nearest training image")


def _doses(axes: Any, summary: Summary) -> int:
    return _responses(axes, summary, summary.doses(), "records of a repeated image")


def _responses(axes: Any, summary: Summary, lines: dict[Line, list[Point]], dose: str) -> int:
    """Share of copies against the factor, the fitted curve, and the intervals of both."""
    fits = summary.fits()
    names, coloured = line_names(lines), colours(lines)
    for line, points in lines.items():
        by_factor = rates_by_factor(points)
        factors = [*by_factor]
        found = [rate_over_seeds(each) for each in by_factor.values()]
        dots(axes, factors, found, coloured[line], 100)
        fit, name = fits[line], names[line]
        if fit is None:
            name = f"{name} (no fit)"
        else:
            x = np.geomspace(factors[0], factors[-1], 200)
            axes.plot(x, 100 * fit.rate(x), "-", color=coloured[line], linewidth=1.3)
            if (band := fit.band(x)) is not None:
                low, high = band
                axes.fill_between(
                    x, 100 * low, 100 * high, color=coloured[line], alpha=0.15, linewidth=0
                )
        axes.plot([], [], "o" if fit is None else "o-", color=coloured[line], ms=4, label=name)
    percent_axis(axes)
    doubling_axis(axes, (point.factor for of in lines.values() for point in of), dose)
    return legend(axes, _means(summary, "logistic fit a seed"))


def _sizes(axes: Any, summary: Summary) -> int:
    """Share with d_1/d_2 < 1/3 against the number of training images, and where it is 90 %."""
    lines, capacities = summary.sizes(), summary.capacities()
    names, coloured = line_names(lines), colours(lines)
    for line, of in lines.items():
        found = [rate_over_seeds([*seeds.values()]) for seeds in of.values()]
        label = f"{names[line]} (EMM {capacities[line].text})"
        shares = [100 * one.value for one in found]
        axes.plot([*of], shares, "-", color=coloured[line], linewidth=1.3, label=label)
        dots(axes, [*of], found, coloured[line], 100)
    axes.axhline(
        100 * MEMORIZED, color="#777777", ls=":", lw=1, label=f"memorized: {100 * MEMORIZED:g} %"
    )
    percent_axis(axes)
    doubling_axis(axes, (size for of in lines.values() for size in of), "training images")
    return legend(axes, _means(summary))


def _models(axes: Any, summary: Summary) -> int:
    """Bars of both measures of memorization, a group a model."""
    cells = cells_of(summary.values)
    reference = subjects_of(summary.values, *cells[0])[0]
    measures = {"copies": "copies", RATIO: "d1/d2 < 1/3"}
    coloured = colours(measures)
    for number, (metric, name) in enumerate(measures.items()):
        known = {
            place + 0.4 * number - 0.2: rate_over_seeds([*measured.values()])
            for place, cell in enumerate(cells)
            if (measured := summary.values.get((*cell, reference, metric)))
        }
        axes.bar(
            [*known],
            [100 * one.value for one in known.values()],
            0.38,
            yerr=error([*known.values()], 100),
            color=coloured[metric],
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
    percent_axis(axes)
    return legend(axes, f"{reference}, {_means(summary)}", columns=2)


def _fronts(summary: Summary) -> dict[tuple[str, int], list[str]]:
    """Cells with several subjects whose copies and quality are known."""
    found = {}
    for cell in cells_of(summary.values):
        subjects = [
            one
            for one in subjects_of(summary.values, *cell)
            if one != HELDOUT and (*cell, one, QUALITY) in summary.values
        ]
        if len(subjects) > 1:
            found[cell] = subjects
    return found


def _front(axes: Any, summary: Summary) -> int:
    """Copies against quality: a colour a subject, a marker a model, better to the lower left."""
    fronts = _fronts(summary)
    coloured = colours(one for subjects in fronts.values() for one in subjects)
    drawn = []
    for number, ((label, factor), subjects) in enumerate(fronts.items()):
        for subject in subjects:
            copies = rate_over_seeds([*summary.values[label, factor, subject, "copies"].values()])
            quality = amount_over_seeds([*summary.values[label, factor, subject, QUALITY].values()])
            drawn.append(quality.value)
            axes.errorbar(
                [100 * copies.value],
                [quality.value],
                xerr=error([copies], 100),
                yerr=error([quality]),
                fmt=MARKERS[number % len(MARKERS)],
                color=coloured[subject],
                markersize=6,
                elinewidth=0.8,
            )
    for subject in dict.fromkeys(one for subjects in fronts.values() for one in subjects):
        axes.plot([], [], "o", color=coloured[subject], label=subject_name(subject))
    for number, cell in enumerate(fronts if len(fronts) > 1 else []):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot([], [], marker, color="#777777", ls="", label=cell_title(*cell))
    distance_axis(axes, drawn)
    axes.set_xlim(left=-3)
    axes.set_xlabel("copies, %")
    axes.set_ylabel(f"{DISTANCES[QUALITY]} (lower is better)")
    return legend(axes, _means(summary), columns=2)
