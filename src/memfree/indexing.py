"""Command `memfree index`: reference index of a dataset folder, calibrated on held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from memfree.bars import counting_bar
from memfree.calibration_size import DEFAULT_RATE, MIN_EXPECTED, too_few_images
from memfree.data import DatasetFolder
from memfree.guidance.calibration import (
    Calibration,
    calibration_of,
    default_similarity,
    measure,
)
from memfree.manifest import check_free_space
from memfree.retrieval import (
    EfficientNetFeatures,
    Features,
    PixelFeatures,
    ReferenceIndex,
    Whitened,
)
from memfree.retrieval.storage import check_replaceable

FeatureName = Literal["pixels", "efficientnet"]


def index(
    dataset: Path,
    out: Path,
    features: FeatureName = "pixels",
    whiten: bool = False,
    batch_size: int = 256,
    overwrite: bool = False,
) -> None:
    """Index the training images of a dataset folder and calibrate thresholds on held-out images.

    Copies of an image become one row that knows how often it is in the training set. The
    calibration part, which is never trained on, says how near a real image comes to the training
    set by itself: thresholds at stated false-positive rates are stored with the index. The index
    holds training images or features of them: treat it like the training set.

    Args:
        dataset: folder that `memfree prepare` wrote.
        out: folder of the index; one of the same dataset and features is replaced.
        features: what images are compared by: pixels (normalized L2 distance), or efficientnet
            (cosine similarity of EfficientNet-Lite0 features, pretrained on ImageNet).
        whiten: whiten efficientnet features on the dataset's fit part, which spreads small or
            uniform images out.
        batch_size: images to embed at a time.
        overwrite: replace an index of another dataset or of other features too.

    Raises:
        ValueError: an option is wrong, the dataset is unfinished or has no calibration images, or
            the out folder holds something else.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: use 1 or more")
    if whiten and features == "pixels":
        raise ValueError("--whiten true needs --features efficientnet")
    folder = DatasetFolder(dataset)
    training, calibration = folder.part("train"), folder.part("calibration")
    extractor = _extractor(features, folder if whiten else None, batch_size)
    check_replaceable(out, folder.hash, extractor.describe(), overwrite)
    dimension = folder.image_shape[0] * folder.image_shape[1] * folder.image_shape[2]
    check_free_space(out, len(training.keys) * (4 * dimension + 100))

    console = Console(stderr=True)
    with counting_bar(console) as progress:
        task = progress.add_task("index", total=len(training.keys))
        built = ReferenceIndex.build(
            folder,
            extractor,
            batch_size=batch_size,
            advance=lambda count: progress.advance(task, count),
        )
        built.to("cuda" if torch.cuda.is_available() else "cpu")
        similarity = default_similarity(built)
        task = progress.add_task("calibrate", total=None)
        measured = measure(built, similarity, calibration.images(), batch_size)
        built.calibrations[similarity.name] = measured.to_json()
        progress.update(task, total=len(calibration.keys), completed=len(calibration.keys))
        built.save(out, overwrite)
    Console().print(summary(built), thresholds(calibration_of(built, similarity)))
    warning = too_few_images(len(calibration.keys))
    if warning:
        console.print(f"{out}: {warning}", soft_wrap=True)


def _extractor(features: FeatureName, fit: DatasetFolder | None, batch_size: int) -> Features:
    if features == "pixels":
        return PixelFeatures()
    network = EfficientNetFeatures()
    if torch.cuda.is_available():
        network.cuda()
    if fit is None:
        return network
    return Whitened.fit(network, fit.part("fit").images(), batch_size=batch_size)


def summary(index: ReferenceIndex) -> Table:
    """Rows, groups, records and duplicated groups of an index, to print."""
    totals = torch.zeros(int(index.group.max()) + 1, dtype=torch.int64)
    totals[index.group.cpu()] = index.group_multiplicity.cpu()
    repeated = int((totals > 1).sum())
    table = Table(title="Reference index", title_justify="left")
    for column in ("distinct images", "groups", "training records", "duplicated groups"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{len(index):,}",
        f"{len(totals):,}",
        f"{int(totals.sum()):,}",
        f"{repeated:,}" + (f" (up to {int(totals.max()):,} records)" if repeated else ""),
    )
    return table


def thresholds(calibration: Calibration) -> Table:
    """Thresholds with intervals at 5 %, 1 % and the smallest rate that n images allow."""
    n = len(calibration.sigmas)
    smallest = MIN_EXPECTED / n
    distance = calibration.similarity.startswith("nl2")
    table = Table(
        title=f"An image is called a copy if σ ({calibration.similarity}) is above",
        caption=f"from {n:,} held-out images" + ("; nL2 is −σ" if distance else ""),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("false positives", "threshold on σ", "95 % interval"):
        table.add_column(column, justify="right")
    for rate in sorted({0.05, DEFAULT_RATE, smallest}, reverse=True):
        if smallest <= rate < 1:
            low, high = calibration.threshold_interval(rate)
            threshold = calibration.threshold(rate)
            table.add_row(f"{100 * rate:.3g} %", f"{threshold:.3f}", f"{low:.3f} … {high:.3f}")
    return table
