"""Pictures of an evaluation: samples beside their nearest training images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.neighbours import Neighbours
from memfree.evaluation.page import SMALL_IMAGE
from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.images import open_image, to_bytes, to_png

if TYPE_CHECKING:
    from memfree.data import DatasetFolder

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


COLUMNS = 12
"""How many samples of the reference subject are shown."""


def choose_samples(found: Neighbours, keys: list[str], count: int = COLUMNS) -> list[int]:
    """Which samples of the reference subject to show, by a rule and not by looking.

    Copies first, in the order of the samples, each of another training image; then, if there are
    too few, further copies, then what is nearest to a training image.

    Args:
        found: the samples' neighbours.
        keys: image key of each sample's nearest reference.
        count: how many to show at most.
    """
    seen: set[str] = set()
    first: list[int] = []
    again: list[int] = []
    for sample in np.flatnonzero(found.copy).tolist():
        (again if keys[sample] in seen else first).append(sample)
        seen.add(keys[sample])
    others = [i for i in np.argsort(-found.sigma, kind="stable").tolist() if not found.copy[i]]
    return (first + again + others)[:count]


def picture_rows(
    chosen: list[int],
    subjects: Mapping[str, tuple[Tensor, Neighbours]],
    reference: str,
    keys: list[str],
    training_images: Mapping[str, Tensor],
) -> list[dict[str, object]]:
    """The pictures with what is written under them, as rows of ``pictures.parquet``.

    Args:
        chosen: sample numbers, from ``choose_samples``.
        subjects: name to (images, neighbours), the reference and all that share its noise.
        reference: name of the subject that was chosen from.
        keys: image key per row of the index.
        training_images: from a key to its image (C, H, W).
    """
    rows: list[dict[str, object]] = []
    nearest = subjects[reference][1]
    for column, sample in enumerate(chosen):
        key = keys[int(nearest.row[sample])]
        rows.append(
            {
                "column": column,
                "subject": None,
                "sample": sample,
                "key": key,
                "multiplicity": int(nearest.multiplicity[sample]),
                "sigma": None,
                "copy": None,
                "png": to_png(to_bytes(training_images[key])),
            }
        )
        for name, (images, found) in subjects.items():
            rows.append(
                {
                    "column": column,
                    "subject": name,
                    "sample": sample,
                    "key": keys[int(found.row[sample])],
                    "multiplicity": int(found.multiplicity[sample]),
                    "sigma": float(found.sigma[sample]),
                    "copy": bool(found.copy[sample]),
                    "png": to_png(to_bytes(images[sample])),
                }
            )
    return rows


def training_images(
    dataset: DatasetFolder, wanted: set[str], batch_size: int = 1024
) -> dict[str, Tensor]:
    """The training images of these keys, without holding all of them in memory."""
    train = dataset.part("train")
    found, start = {}, 0
    for batch in train.batches(batch_size):
        for place, key in enumerate(train.keys[start : start + len(batch)]):
            if key in wanted:
                found[key] = batch[place]
        start += len(batch)
    return found
