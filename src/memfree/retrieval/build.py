"""Building a reference index: embedding images, merging copies, grouping near copies."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from memfree.data.duplicates import group as connected
from memfree.data.duplicates import near_pairs, numbered
from memfree.images import to_bytes
from memfree.retrieval.features.base import Features
from memfree.retrieval.items import Items, conditions_table

if TYPE_CHECKING:
    from memfree.data import DatasetFolder

Condition = tuple[int, int | None, str | None, int]
"""Position of an image, its label, its caption, and the number of records with them."""


@dataclass
class Origin:
    """N images in a fixed order, not yet merged or grouped."""

    batches: Callable[[int], Iterator[Tensor]]
    """Streams the images (b, C, H, W) in [-1, 1] in order, for a batch size."""
    keys: list[str]
    counts: Tensor
    """(N,) int64 training records of every image."""
    groups: list[object] | None
    """N group names, or None to find groups by content."""
    conditions: list[Condition]
    num_classes: int | None
    shards: list[str | None]
    """Shard of every image's first record, None if unknown."""
    dataset_hash: str | None = None

    @classmethod
    def of_images(
        cls,
        images: Tensor,
        keys: Sequence[str] | None,
        groups: Sequence[object] | Tensor | None,
        counts: Tensor | None,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        num_classes: int | None,
    ) -> Origin:
        """Take images (N, C, H, W); checks the arguments of ``ReferenceIndex.build``."""
        check_images(images)
        size = len(images)
        given = {"keys": keys, "groups": groups, "counts": counts, "labels": labels}
        for name, value in {**given, "captions": captions}.items():
            if value is not None and len(value) != size:
                raise ValueError(f"{name} has {len(value)} entries, but there are {size} images")
        counts = torch.ones(size, dtype=torch.int64) if counts is None else counts.cpu().long()
        if bool((counts < 1).any()):
            raise ValueError("counts must be at least 1: leave out images that are not trained on")
        num_classes = None if labels is None else _checked_classes(labels, num_classes)
        names = groups.tolist() if isinstance(groups, Tensor) else groups
        conditions: list[Condition] = []
        if labels is not None or captions is not None:
            label_list = [None] * size if labels is None else labels.tolist()
            caption_list = [None] * size if captions is None else captions
            conditions = list(
                zip(range(size), label_list, caption_list, counts.tolist(), strict=True)
            )
        return cls(
            batches=lambda batch_size: iter(images.split(batch_size)),
            keys=list(keys) if keys is not None else [f"image-{i:08d}" for i in range(size)],
            counts=counts,
            groups=None if names is None else list(names),
            conditions=conditions,
            num_classes=num_classes,
            shards=[None] * size,
        )

    @classmethod
    def of_dataset(cls, dataset: DatasetFolder) -> Origin:
        """Take a dataset's train part, with its own keys, groups, copies and conditions."""
        part = dataset.part("train")
        if not part.keys:
            raise ValueError(f"{dataset.path} has no training images to index")
        position = {key: i for i, key in enumerate(part.keys)}
        table = part.conditions
        names = ("image_key", "label", "caption", "count")
        columns = [
            table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
            for name in names
        ]
        records = dataset.part_records("train")
        shard: dict[int, str] = {}  # of every image's first record
        for row, name in zip(records["row"].to_pylist(), records["shard"].to_pylist(), strict=True):
            shard.setdefault(row, name)
        return cls(
            batches=part.batches,
            keys=list(part.keys),
            counts=part.copies.cpu().long(),
            groups=list(part.groups),
            # A condition counts only if the image is trained on; the table may list others.
            conditions=[
                (position[key], label, caption, count)
                for key, label, caption, count in zip(*columns, strict=True)
                if key in position and (label is not None or caption is not None)
            ],
            num_classes=dataset.num_classes,
            shards=[shard.get(row) for row in part.rows.tolist()],
            dataset_hash=dataset.hash,
        )


def check_images(images: Tensor) -> None:
    """Refuse anything but images (N, C, H, W) in [-1, 1]."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W) and not empty, not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be float in [-1, 1], not {images.dtype}: use u8/127.5 - 1")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= -1.001 and high <= 1.001):  # false for NaN too
        raise ValueError(f"images must be finite and in [-1, 1], but span {low:g} … {high:g}")


def _checked_classes(labels: Tensor, num_classes: int | None) -> int:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        last = "num_classes" if num_classes is None else num_classes
        raise ValueError(f"labels span {low} … {high}, but must be at least 0 and below {last}")
    return num_classes if num_classes is not None else high + 1


@dataclass
class Embedded:
    """N embedded images, in the order of their origin."""

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
    """Embed and hash the images, batch by batch; also return their (C, H, W)."""
    hashes: list[str] = []
    parts: list[Tensor] = []
    for batch in origin.batches(batch_size):
        check_images(batch)
        hashes += content_hashes(batch)
        parts.append(features.embed(batch, batch_size).cpu())
        channels, height, width = batch.shape[1:]
        if advance is not None:
            advance(len(batch))
    return Embedded(torch.cat(parts), hashes), (channels, height, width)


def assemble(origin: Origin, images: Embedded, batch_size: int) -> tuple[Tensor, Items]:
    """Vectors (rows, D) and items, one row for identical images; undeclared groups are found."""
    assert len(images.hashes) == len(images.vectors) == len(origin.keys)
    row = numbered(images.hashes)
    kept = torch.from_numpy(np.unique(row, return_index=True)[1])
    if origin.groups is not None:
        group = joined_by_copies(row, origin.groups)
    else:
        pixels = torch.cat(list(origin.batches(batch_size)))[kept]
        group = connected(len(kept), near_copies(pixels))
    vectors = images.vectors
    if len(kept) < len(vectors):
        vectors = vectors[kept]
    return vectors, merged(origin, row, group, images.hashes)


def content_hashes(images: Tensor) -> list[str]:
    """SHA-256 of every image's float32 values, for images (N, C, H, W); −0 counts as 0."""
    values = (images.detach().to("cpu", torch.float32) + 0.0).flatten(1).numpy()
    return [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest() for row in values]


def near_copies(images: Tensor, since: int = 0) -> np.ndarray:
    """``near_pairs`` of images (N, C, H, W) in [-1, 1]."""
    return near_pairs(to_bytes(images.detach().to("cpu", torch.float32)).numpy(), since=since)


def joined_by_copies(row: np.ndarray, names: Sequence[object]) -> np.ndarray:
    """Group of every row; an image with copies joins all their groups. ``row`` (N,) is each
    image's."""
    first = np.unique(row, return_index=True)[1]
    copies = np.stack([first[row], np.arange(len(row))], axis=1)
    # In tuples: None is a valid name.
    return connected(len(row), copies, [(name,) for name in names])[first]


def merged(origin: Origin, row: np.ndarray, group: np.ndarray, hashes: Sequence[str]) -> Items:
    """Items of an index, adding up images that share a row; ``group`` is per row."""
    _, first = np.unique(row, return_index=True)
    keys = [origin.keys[i] for i in first]
    multiplicity = torch.zeros(len(first), dtype=torch.int64)
    multiplicity.index_add_(0, torch.from_numpy(row), origin.counts)
    totals: Counter[tuple[int, int | None, str | None]] = Counter()
    for position, label, caption, count in origin.conditions:
        totals[int(row[position]), label, caption] += count
    return Items(
        keys,
        torch.from_numpy(group),
        multiplicity,
        conditions_table(totals, keys),
        origin.num_classes,
        [origin.shards[i] for i in first],
        [hashes[i] for i in first],
    )
