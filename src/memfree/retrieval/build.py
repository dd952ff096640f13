"""Building a reference index from tensors, and adding to or removing from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.retrieval.features.base import Features, PixelFeatures
from memfree.retrieval.grouping import (
    content_hashes,
    joined,
    joined_by_copies,
    near_copies,
    numbered,
)
from memfree.retrieval.items import CONDITIONS, Condition, Items, Origin, check_images

if TYPE_CHECKING:
    from memfree.retrieval.rows import Searched


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


def added(
    index: Searched,
    images: Tensor,
    captions: Sequence[str] | None,
    labels: Tensor | None,
    groups: Sequence[object] | Tensor | None,
    counts: Tensor | None,
    keys: Sequence[str] | None,
    batch_size: int,
) -> tuple[Tensor, Items]:
    """Vectors and items of the index with more images; see ``ReferenceIndex.add``."""
    if (labels is None) != (index.num_classes is None):
        raise ValueError(
            "the index has no labels, so images with labels cannot be added"
            if labels is not None
            else "the index has labels: give the labels of the images to add"
        )
    if keys is None:
        keys = _free_keys(index.keys, len(images))
    origin = Origin.of_images(images, keys, groups, counts, labels, captions, index.num_classes)
    if tuple(images.shape[1:]) != tuple(index.image_shape):
        raise ValueError(
            f"images to add are {tuple(images.shape[1:])}, but the index is of images "
            f"{tuple(index.image_shape)}"
        )
    hashes = _contents(index) + content_hashes(images)
    row = numbered(hashes)
    old, total = len(index), int(row.max()) + 1
    _check_keys(index.keys, list(keys), row[old:])
    # New rows are numbered after the old ones, in the order of their first image.
    new = torch.from_numpy(np.unique(row, return_index=True)[1][old:] - old)
    group = joined_by_copies(row, _group_names(index, origin))
    pairs = _near(index, images[new], declared=groups is not None)
    if len(pairs):
        first = np.unique(group, return_index=True)[1]
        same = np.stack([first[group], np.arange(total)], axis=1)
        group = joined(total, np.concatenate([same, pairs]))
    vectors = index.vectors.cpu()
    if len(new):
        fresh = index.features.embed(images[new].to(index.device), batch_size).cpu()
        vectors = torch.cat([vectors, fresh])
    items = Items.merged(_together(index, origin), row, group, hashes)
    return vectors, items


def removed(index: Searched, keys: Iterable[str]) -> tuple[Tensor, Items]:
    """Vectors and items of the index without some images; see ``ReferenceIndex.remove``."""
    if isinstance(keys, str):
        keys = [keys]
    gone = set(keys)
    unknown = gone - set(index.keys)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"the index has no image {min(unknown)!r}{more}; nothing was removed")
    kept = [row for row, key in enumerate(index.keys) if key not in gone]
    if not kept:
        raise ValueError("this would remove all images of the index; an index cannot be empty")
    rows, items = torch.tensor(kept), index.items
    position = {row: place for place, row in enumerate(kept)}
    table = items.conditions.filter(
        pa.array([row in position for row in _list(items, "row")], pa.bool_())
    )
    numbers = pa.array([position[row] for row in table["row"].to_pylist()], pa.int64())
    table = table.set_column(0, CONDITIONS.field("row"), numbers)
    rest = Items(
        [items.keys[row] for row in kept],
        torch.from_numpy(numbered(items.group.cpu()[rows].tolist())),
        items.multiplicity.cpu()[rows],
        table,
        index.num_classes,
        [items.shards[row] for row in kept],
        [items.contents[row] for row in kept],
    )
    return index.vectors.cpu()[rows], rest


def _list(items: Items, column: str) -> list[Any]:
    return items.conditions[column].to_pylist()


def _free_keys(taken: list[str], count: int) -> list[str]:
    known, number = set(taken), len(taken)
    keys: list[str] = []
    while len(keys) < count:
        key = f"image-{number:08d}"
        if key not in known:
            keys.append(key)
        number += 1
    return keys


def _contents(index: Searched) -> list[str]:
    """Content hash of every row."""
    if isinstance(index.features, PixelFeatures):
        parts = index.vectors.split(4096)
        shaped = (part.reshape(len(part), *index.image_shape) for part in parts)
        return [digest for part in shaped for digest in content_hashes(part)]
    contents = [content for content in index.items.contents if content is not None]
    if len(contents) < len(index):
        raise ValueError(
            "this index does not know which images it holds (its keys are hashed, or it is of an "
            "older version): add to the index that it was made from, or build it again"
        )
    return contents


def _check_keys(old: list[str], new: list[str], row: np.ndarray) -> None:
    """Refuse a key that stands for two images."""
    known: dict[str, int] = {}
    for key, number in zip(old, range(len(old)), strict=True):
        known.setdefault(key, number)
    for key, number in zip(new, row.tolist(), strict=True):
        if known.setdefault(key, number) != number:
            raise ValueError(f"key {key!r} already stands for another image")


def _group_names(index: Searched, origin: Origin) -> list[object]:
    """Group name of every old row and new image; a new one may name an old image's key."""
    old = [("indexed", number) for number in index.group.tolist()]
    if origin.groups is None:
        return [*old, *(("alone", position) for position in range(len(origin.keys)))]
    of_key = dict(zip(index.keys, old, strict=True))
    return [*old, *(of_key.get(str(name), ("declared", name)) for name in origin.groups)]


def _near(index: Searched, images: Tensor, declared: bool) -> np.ndarray:
    """Pairs (P, 2) of rows that are near copies, each with a new row in it.

    Only an index of pixels still has the old images to compare with.
    """
    none = np.zeros((0, 2), dtype=np.int64)
    if declared or not len(images):
        return none
    if not isinstance(index.features, PixelFeatures):
        return near_copies(images) + len(index)
    old = index.vectors.cpu().reshape(-1, *index.image_shape)
    # New images first: only their rows are compared, with all others.
    pairs = near_copies(torch.cat([images.cpu().float(), old]), first=len(images))
    return np.where(pairs < len(images), pairs + len(index), pairs - len(images))


def _together(index: Searched, origin: Origin) -> Origin:
    """Old rows, each with its records, followed by the new images."""
    items = index.items
    columns = [_list(items, name) for name in ("row", "label", "caption", "count")]
    conditions: list[Condition] = list(zip(*columns, strict=True))
    old = len(index)
    conditions += [(place + old, *rest) for place, *rest in origin.conditions]  # type: ignore[misc]
    return Origin(
        batches=origin.batches,
        keys=[*items.keys, *origin.keys],
        counts=torch.cat([items.multiplicity.cpu(), origin.counts]),
        groups=None,
        conditions=conditions,
        num_classes=index.num_classes,
        shards=[*items.shards, *origin.shards],
    )
