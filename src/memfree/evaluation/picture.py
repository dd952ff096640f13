"""The picture for a README: a strip of triples, and the rates of copies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from memfree.data.decode import open_image
from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.page import SMALL_IMAGE
from memfree.evaluation.plots import PRINTED_COLOURS

MAX_COLUMNS = 8
BAD, GOOD, INK, MUTED, PAPER = "#c2412d", "#1d7a5f", "#1d1d1f", "#66666e", "#ffffff"


def write_picture(folder: EvaluationFolder, path: Path) -> None:
    """Draw the picture as PNG on white, so that it reads on light and dark pages."""
    columns = sorted({row["column"] for row in folder.pictures})[:MAX_COLUMNS]
    subjects: list[str | None] = [folder.reference, None, *folder.paired]
    cells = {(row["subject"], row["column"]): row for row in folder.pictures}
    # All in inches: labels, pictures, labels of the bars, bars.
    side, gap, labels, bars = 0.66, 0.06, 1.25, 2.2
    width = labels + len(columns) * (side + gap) + 1.1 + bars
    height = len(subjects) * (side + gap) + 0.35
    with matplotlib.rc_context({"font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        for line, subject in enumerate(subjects):
            bottom = height - 0.15 - (line + 1) * (side + gap)
            label = "nearest\ntraining image" if subject is None else subject
            middle = (bottom + side / 2) / height
            figure.text((labels - 0.12) / width, middle, label, ha="right", va="center")
            for place, column in enumerate(columns):
                left = labels + place * (side + gap)
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                _draw(axes, cells[subject, column])
        tall = min(height - 0.75, 0.42 * len(folder.subjects))
        place_of_bars = (
            (width - bars - 0.1) / width,
            (height - tall - 0.05) / 2 / height,
            bars / width,
            tall / height,
        )
        _bars(figure, folder, place_of_bars)
        figure.savefig(path, format="png", dpi=200, facecolor=PAPER)


def _draw(axes: Any, row: dict[str, Any]) -> None:
    found = open_image(row["png"], "a picture of the evaluation")
    image = np.asarray(found if found.mode == "L" else found.convert("RGB"))
    smooth = "nearest" if max(image.shape[:2]) < SMALL_IMAGE else "bilinear"
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    source = row["subject"] is None
    for spine in axes.spines.values():
        spine.set_visible(not source)
        spine.set_linewidth(2)
        spine.set_color(BAD if row["copy"] else GOOD)
    if source and row["multiplicity"] > 1:
        axes.text(
            0.96,
            0.06,
            f"×{row['multiplicity']}",
            transform=axes.transAxes,
            color="white",
            fontsize=7,
            weight="bold",
            ha="right",
            va="bottom",
            bbox={"facecolor": "#141416", "alpha": 0.82, "pad": 1.5, "linewidth": 0},
        )


def _bars(
    figure: Figure, folder: EvaluationFolder, place: tuple[float, float, float, float]
) -> None:
    """Rates of copies, one bar a subject, with Wilson's intervals."""
    axes = figure.add_axes(place)
    for line, name in enumerate(folder.subjects):
        found = folder.metrics.get("copies", name)
        assert found is not None and found.low is not None and found.high is not None
        value, low, high = (100 * v for v in (found.value, found.low, found.high))
        axes.barh(line, value, 0.62, color=PRINTED_COLOURS[line % len(PRINTED_COLOURS)])
        axes.errorbar(
            value,
            line,
            xerr=[[max(value - low, 0)], [max(high - value, 0)]],
            color=INK,
            capsize=2,
            linewidth=1,
        )
        axes.text(
            high + 3 * _highest(folder), line, f"{value:.1f} %" if value else "0 %", va="center"
        )
    axes.set_yticks(range(len(folder.subjects)), folder.subjects)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 135 * _highest(folder)))
    axes.set_title("samples that are copies, %", fontsize=9, loc="left", color=MUTED)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _highest(folder: EvaluationFolder) -> float:
    found = [folder.metrics.get("copies", name) for name in folder.subjects]
    return max(one.high or 0.0 for one in found if one is not None)
