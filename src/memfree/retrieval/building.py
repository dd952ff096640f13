"""From a stream of images to the rows of an index: embedded, merged and grouped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass
class Embedded:
    """N images as an index needs them, in the order of their origin."""

    vectors: Tensor
    """(N, D) float32 on the CPU."""
    hashes: list[str]
    """N content hashes."""


def embedded(
    origin: Origin,
    features: Features,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[Embedded, tuple[int, int, int]]:
    """Embed and hash the images, batch by batch; also returns their (C, H, W).

    Args:
        origin: the images, read once, in batches.
        features: what images are compared by.
        batch_size: images at a time.
        advance: called with the number of images of every batch that is done.
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
    assert len(shapes) == 1
    channels, height, width = shapes.pop()
    return Embedded(torch.cat(parts), hashes), (channels, height, width)


def assemble(origin: Origin, images: Embedded, batch_size: int) -> tuple[Tensor, Items]:
    """One row for identical images, and which rows belong together.

    Args:
        origin: the images, which are read to find near copies if no groups are declared.
        images: what ``embedded`` made of them.
        batch_size: images to read at a time.

    Returns:
        vectors (rows, D) float32 on the CPU, and the rows' items.
    """
    assert len(images.hashes) == len(images.vectors) == len(origin.keys)
    row = numbered(images.hashes)
    kept = torch.from_numpy(np.unique(row, return_index=True)[1])
    if origin.groups is not None:
        group = joined_by_copies(row, origin.groups)
    else:
        pixels = torch.cat(list(origin.batches(batch_size)))[kept]
        group = joined(len(kept), near_copies(pixels))
    vectors = images.vectors
    if len(kept) < len(vectors):
        vectors = vectors[kept]
    return vectors, Items.merged(origin, row, group, images.hashes)
