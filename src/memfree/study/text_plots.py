"""The pictures of a text study: samples, copies against quality, how well copies are foreseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.folders.atomic_files import write_atomic
from memfree.sampling.folder import SampleFolder

if TYPE_CHECKING:
    from memfree.evaluation.metrics import Metric
    from memfree.study.detectors import Roc

HIGHLIGHTED = {
    "none": "#444444",
    "oracle": "#999999",
    "amg": PRINTED_COLOURS[1],
    "multiplicity": PRINTED_COLOURS[4],
    "both": PRINTED_COLOURS[2],
}
"""Colours of the subjects that the eye should find; the others are blue."""
PANELS = (
    ("duplicated", "frechet_efficientnet", "Fréchet distance, EfficientNet"),
    ("unseen", "clip_margin", "CLIP margin on unseen captions"),
)
"""Prompt set, metric and label of each panel's vertical axis."""

COLUMNS = 10
"""Samples in a row of the picture."""


def write_rows(path: Path, folders: Mapping[str, Path]) -> None:
    """Write a PNG of the first samples, a row a subject; each column is from the same noise."""
    figure = Figure(figsize=(7, 0.62 * len(folders)), layout="constrained")
    grid = figure.subplots(len(folders), COLUMNS, squeeze=False)
    for row, (subject, folder) in zip(grid, folders.items(), strict=True):
        images = next(iter(SampleFolder(folder).batches(COLUMNS)))
        row[0].set_ylabel(subject, rotation=0, ha="right", va="center", fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image in zip(row, images, strict=False):
            # Without smoothing: these pixels are what was judged.
            axes.imshow(
                ((image + 1) / 2).permute(1, 2, 0).squeeze(2).numpy(),
                "gray",
                interpolation="nearest",
            )
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def write_front(
    path: Path, found: Mapping[tuple[Any, str, str], Metric], subjects: Sequence[str]
) -> None:
    """Write a PNG: copies on repeated captions against quality, a dot a subject."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axes, (prompts, name, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for subject in subjects:
            copies = found.get(("duplicated", subject, "pixel_copies"))
            quality = found.get((prompts, subject, name))
            if copies is None or quality is None:
                continue
            colour = HIGHLIGHTED.get(subject, PRINTED_COLOURS[0])
            x = 100 * copies.value
            axes.plot([x], [quality.value], "o", color=colour, markersize=6)
            axes.annotate(
                subject,
                (x, quality.value),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
                color=colour,
            )
        axes.set_xlabel("copies by pixels on captions of repeated images, %")
        axes.set_title(label, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def write_roc(path: Path, rocs: Sequence[Roc]) -> None:
    """Write a PNG with the ROC curve of each score."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, roc in enumerate(rocs):
        curve = roc.detector.roc
        axes.plot(
            curve["false_positive_rate"].to_numpy(),
            curve["true_positive_rate"].to_numpy(),
            color=PRINTED_COLOURS[number % len(PRINTED_COLOURS)],
            label=f"{roc.title} (AUC {roc.detector.auc.value:.3f})",
        )
    axes.plot([0, 1], [0, 1], ":", color="#bbbbbb")
    axes.set_xlabel("samples that are no copies, called copies")
    axes.set_ylabel("copies found")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
