"""What an index is built from: images with what is known of them, or a dataset folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memfree.data import DatasetFolder, DatasetPart

Condition = tuple[int, int | None, str | None, int]
"""Position of an image, its label, its caption, and how many records carry them."""


@dataclass
class Origin:
    """N images in a fixed order, not yet merged or grouped.

    Attributes:
        batches: called with a batch size, streams the images (b, C, H, W) in [-1, 1] in order.
        keys: N image keys.
        counts: (N,) int64 training records of every image.
        groups: N group names, or None to find groups by content.
        conditions: labels and captions of the records.
        num_classes: number of classes, None without labels.
        shards: shard of every image's first record, None where it is not known.
        dataset_hash: of the dataset folder, None for tensors.
    """

    batches: Callable[[int], Iterator[Tensor]]
    keys: list[str]
    counts: Tensor
    groups: list[object] | None
    conditions: list[Condition]
    num_classes: int | None
    shards: list[str | None]
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
        """Images (N, C, H, W); arguments of ``ReferenceIndex.build``, checked here."""
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
            caption_list = [None] * size if captions is None else list(captions)
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
        """The train part of a dataset folder, with its own keys, groups, copies and conditions."""
        part = dataset.part("train")
        if not part.keys:
            raise ValueError(f"{dataset.path} has no training images to index")
        position = {key: i for i, key in enumerate(part.keys)}
        table = part.conditions
        absent = [None] * table.num_rows
        labels, captions = (
            table[name].to_pylist() if name in table.column_names else absent
            for name in ("label", "caption")
        )
        entries = zip(
            table["image_key"].to_pylist(),
            labels,
            captions,
            table["count"].to_pylist(),
            strict=True,
        )
        return cls(
            batches=part.batches,
            keys=list(part.keys),
            counts=part.copies.cpu().long(),
            groups=list(part.groups),
            # A condition counts only if the image is trained on; the table may name other parts'.
            conditions=[
                (position[key], label, caption, count)
                for key, label, caption, count in entries
                if key in position and (label is not None or caption is not None)
            ],
            num_classes=dataset.num_classes,
            shards=_first_shards(dataset, part),
            dataset_hash=dataset.hash,
        )


def _first_shards(dataset: DatasetFolder, part: DatasetPart) -> list[str | None]:
    """Shard of every image's first record."""
    records = dataset.part_records("train")
    shard: dict[int, str] = {}
    for row, name in zip(records["row"].to_pylist(), records["shard"].to_pylist(), strict=True):
        shard.setdefault(row, name)
    return [shard.get(row) for row in part.rows.tolist()]


def check_images(images: Tensor) -> None:
    """Refuse what cannot be a stack of images (N, C, H, W) in [-1, 1]; one clear ValueError."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W) and not empty, not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be float in [-1, 1], not {images.dtype}: use u8/127.5 - 1")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= -1.001 and high <= 1.001):  # also what NaN fails
        raise ValueError(f"images must be finite and in [-1, 1], but span {low:g} … {high:g}")


def _checked_classes(labels: Tensor, num_classes: int | None) -> int:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        last = "num_classes" if num_classes is None else num_classes
        raise ValueError(f"labels span {low} … {high}, but must be at least 0 and below {last}")
    return num_classes if num_classes is not None else high + 1
