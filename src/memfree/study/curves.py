"""The picture of what a study varied: copies by repetitions, data size or model, and by quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memfree.evaluation.metrics import HELDOUT
from memfree.study.capacity import MEMORIZED
from memfree.study.drawing import (
    colours,
    distance_axis,
    dots,
    doubling_axis,
    error,
    legend,
    line_names,
    percent_axis,
    save,
    subject_name,
    title,
)
from memfree.study.labels import cell_title
from memfree.study.logistic import Point
from memfree.study.statistics import amount_over_seeds, rate_over_seeds
from memfree.study.summary import Line, Summary, rates_by_factor
from memfree.study.values import DISTANCES, RATIO, cells_of, subjects_of

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
