"""The picture of a study: copies against repetitions and data size, and against quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memfree.evaluation.intervals import Interval
from memfree.evaluation.metrics import HELDOUT
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.manifest import write_atomic
from memfree.study.capacity import MEMORIZED
from memfree.study.statistics import Measured, over_seeds, rate_over_seeds
from memfree.study.summary import RATIO, Summary, cell_title
from memfree.study.values import DISTANCES, cells_of, subjects_of

QUALITY = "frechet_pixels"
"""Metric of the vertical axis against copies."""
MARKERS = "os^Dvpx*"
"""A marker a model, where a panel has several."""
_WIDTH = 4.6


def write_curves(path: Path, summary: Summary) -> bool:
    """Write a PNG with a panel for each thing that the study varied.

    Returns:
        Whether there was anything to draw.
    """
    panels: list[Callable[[Any], None]] = []
    if summary.per_image():
        panels.append(lambda axes: _per_image(axes, summary))
    if summary.doses():
        panels.append(lambda axes: _doses(axes, summary))
    if summary.sizes():
        panels.append(lambda axes: _sizes(axes, summary))
    elif not summary.doses() and len(cells_of(summary.values)) > 1:
        panels.append(lambda axes: _models(axes, summary))
    if _fronts(summary):
        panels.append(lambda axes: _front(axes, summary))
    if not panels:
        return False
    figure = Figure(figsize=(_WIDTH * len(panels), 4.0), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    return True


def _colour(number: int) -> str:
    return PRINTED_COLOURS[number % len(PRINTED_COLOURS)]


def _error(found: Interval, scale: float = 1.0) -> list[list[float]]:
    """Lengths of an error bar, (2, 1)."""
    low = found.value if found.low is None else found.low
    high = found.value if found.high is None else found.high
    return [[scale * max(found.value - low, 0.0)], [scale * max(high - found.value, 0.0)]]


def _per_image(axes: Any, summary: Summary) -> None:
    """Copies of an image against its records: mean over seeds, a dot a seed."""
    for number, (subject, by_factor) in enumerate(summary.per_image().items()):
        colour = _colour(number)
        factors = sorted(by_factor)
        means = [over_seeds([one.value for one in by_factor[f].values()]).value for f in factors]
        axes.plot(factors, means, "-", color=colour, label=subject)
        for factor in factors:
            each = [one.value for one in by_factor[factor].values()]
            axes.plot([factor] * len(each), each, ".", color=colour, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("records of the image")
    axes.set_title("copies of an image, among all samples", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _doses(axes: Any, summary: Summary) -> None:
    """Share of copies against the factor, with intervals over seeds and the fitted curve."""
    fits = summary.fits()
    for number, (line, points) in enumerate(summary.doses().items()):
        colour = _colour(number)
        factors = sorted({point.factor for point in points})
        for factor in factors:
            at = [Measured(p.copies / p.count, p.count) for p in points if p.factor == factor]
            found = rate_over_seeds(at)
            axes.errorbar(
                [factor],
                [100 * found.value],
                yerr=_error(found, 100),
                fmt="o",
                color=colour,
                markersize=4,
                capsize=2,
                linewidth=1,
            )
        fit = fits[line]
        if fit is not None:
            x = np.geomspace(factors[0], factors[-1], 200)
            axes.plot(x, 100 * fit.rate(x), "-", color=colour, linewidth=1.3)
        axes.plot([], [], "o-", color=colour, markersize=4, label=", ".join(line))
    axes.set_xscale("log", base=2)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("records of a repeated image")
    axes.set_title("copies, %, with a logistic fit", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _sizes(axes: Any, summary: Summary) -> None:
    """Share with d_1/d_2 < 1/3 against the number of training images."""
    for number, (line, of) in enumerate(summary.sizes().items()):
        colour = _colour(number)
        found = [rate_over_seeds([*seeds.values()]) for seeds in of.values()]
        axes.plot([*of], [100 * one.value for one in found], "-", color=colour, linewidth=1.3)
        for size, one in zip(of, found, strict=True):
            axes.errorbar(
                [size],
                [100 * one.value],
                yerr=_error(one, 100),
                fmt="o",
                color=colour,
                markersize=4,
                capsize=2,
                linewidth=1,
            )
        axes.plot([], [], "o-", color=colour, markersize=4, label=", ".join(line))
    axes.axhline(100 * MEMORIZED, color="#999999", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("training images")
    axes.set_title("samples with d1/d2 < 1/3, %", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _models(axes: Any, summary: Summary) -> None:
    """Bars of both measures of memorization, a group a model."""
    cells = cells_of(summary.values)
    reference = subjects_of(summary.values, *cells[0])[0]
    for number, (name, label) in enumerate((("copies", "copies"), (RATIO, "d1/d2 < 1/3"))):
        for place, cell in enumerate(cells):
            measured = summary.values.get((*cell, reference, name))
            if not measured:
                continue
            found = rate_over_seeds([*measured.values()])
            axes.bar(
                [place + 0.4 * number - 0.2],
                [100 * found.value],
                0.38,
                yerr=_error(found, 100),
                color=_colour(number),
                capsize=3,
                label=label if place == 0 else None,
            )
    axes.set_xticks(
        range(len(cells)),
        [cell_title(*cell).replace(", ", "\n") for cell in cells],
        fontsize=8,
        rotation=20 if len(cells) > 4 else 0,
    )
    axes.set_title(f"memorized samples, %, {reference}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


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


def _front(axes: Any, summary: Summary) -> None:
    """Copies against quality: a colour a subject, a marker a model."""
    fronts = _fronts(summary)
    names = list(dict.fromkeys(one for subjects in fronts.values() for one in subjects))
    for number, (cell, subjects) in enumerate(fronts.items()):
        for subject in subjects:
            model, factor = cell
            copies = rate_over_seeds([*summary.values[model, factor, subject, "copies"].values()])
            measured = summary.values[model, factor, subject, QUALITY].values()
            quality = over_seeds([one.value for one in measured])
            axes.plot(
                [100 * copies.value],
                [quality.value],
                MARKERS[number % len(MARKERS)],
                color=_colour(names.index(subject)),
                markersize=6,
            )
            if len(fronts) == 1:
                axes.annotate(
                    subject,
                    (100 * copies.value, quality.value),
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=8,
                )
    if len(fronts) > 1:
        for number, subject in enumerate(names):
            axes.plot([], [], "o", color=_colour(number), label=subject)
        for number, cell in enumerate(fronts):
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([], [], marker, color="#777777", label=cell_title(*cell))
        axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.set_yscale("log")
    axes.set_xlabel("copies, %")
    axes.set_title(f"{DISTANCES[QUALITY]}, against copies", loc="left", fontsize=10)
