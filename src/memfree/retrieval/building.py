"""From a stream of images to the rows of an index: embedded, merged and grouped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from memfree.retrieval.features import Features
from memfree.retrieval.grouping import (
    content_hashes,
    joined,
    joined_by_copies,
    near_copies,
    numbered,
)
from memfree.retrieval.items import Items
from memfree.retrieval.origin import Origin, check_images


def assemble(
    origin: Origin,
    features: Features,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Items, tuple[int, int, int]]:
    """Embed the images, one row for identical ones, and say which rows belong together.

    Args:
        origin: the images, read once, in batches; a second time to find near copies if no groups
            are declared.
        features: what images are compared by.
        batch_size: images at a time.
        advance: called with the number of images of every batch that is done.

    Returns:
        vectors (rows, D) float32 on the CPU, the rows' items, and the images' (C, H, W).
    """
    hashes: list[str] = []
    parts: list[Tensor] = []
    shapes: set[tuple[int, ...]] = set()
    for batch in origin.batches(batch_size):
        check_images(batch)
        hashes += content_hashes(batch)
        parts.append(features.embed(batch, batch_size).cpu())
        shapes.add(tuple(batch.shape[1:]))
        if advance is not None:
            advance(len(batch))
    assert len(shapes) == 1 and len(hashes) == len(origin.keys)
    channels, height, width = shapes.pop()
    row = numbered(hashes)
    kept = torch.from_numpy(np.unique(row, return_index=True)[1])
    if origin.groups is not None:
        group = joined_by_copies(row, origin.groups)
    else:
        images = torch.cat(list(origin.batches(batch_size)))[kept]
        group = joined(len(kept), near_copies(images))
    vectors = torch.cat(parts)
    if len(kept) < len(vectors):
        vectors = vectors[kept]
    return vectors, Items.merged(origin, row, group), (channels, height, width)
