"""The picture of mitigations beside the oracle: what is measured against the number of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memfree.evaluation.metrics import HELDOUT
from memfree.study.drawing import (
    colours,
    distance_axis,
    doubling_axis,
    percent_axis,
    save,
    subject_name,
    title,
)
from memfree.study.labels import LADDER
from memfree.study.values import DISTANCES, ORACLES, RATES, Values, cells_of, subjects_of

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
