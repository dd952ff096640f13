"""Labels that say nothing of the image: drawn at random, or one for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memfree.data.options import LabelPolicy
from memfree.data.shards import Record


def relabelled(
    records: Sequence[Record], policy: LabelPolicy, num_classes: int | None, seed: int
) -> tuple[list[Record], int | None]:
    """Training records under other labels (Gu et al., 2023, "On Memorization in Diffusion Models").

    Args:
        records: of the training part; records of one image get one label.
        policy: own: as they are; random: drawn uniformly from the source's classes whatever the
            image shows; unique: a class of its own for each image.
        num_classes: of the source.
        seed: of the draws.

    Returns:
        The records, and the number of classes they have now.

    Raises:
        ValueError: there are no labels that could be replaced.
    """
    if policy == "own":
        return list(records), num_classes
    if num_classes is None:
        raise ValueError(f"--labels {policy} needs a source with labels")
    rows = list(dict.fromkeys(record.row for record in records))
    if policy == "unique":
        drawn = list(range(len(rows)))
        classes = len(rows)
    else:
        generator = np.random.Generator(np.random.PCG64([seed, 12]))
        drawn = generator.integers(num_classes, size=len(rows)).tolist()
        classes = num_classes
    label_of = dict(zip(rows, drawn, strict=True))
    return [replace(record, label=label_of[record.row]) for record in records], classes
