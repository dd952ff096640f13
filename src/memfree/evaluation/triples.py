"""The triples of the report: a sample, its nearest training image, guided samples of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from memfree.evaluation.neighbours import Neighbours
from memfree.sampling import png

if TYPE_CHECKING:
    from memfree.data import DatasetFolder

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
                "png": png.encode(png.to_bytes(training_images[key])),
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
                    "png": png.encode(png.to_bytes(images[sample])),
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
