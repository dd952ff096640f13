"""Items of a reference index: keys, groups, counts, conditions, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.retrieval.options import CaptionPolicy

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


CONDITIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("image_key", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("count", pa.int64()),
    ]
)


class Items:
    """Keys, groups, multiplicities and conditions of an index's rows.

    Args:
        keys: image key of every row.
        group: (rows,) int64 group numbers, 0 to groups − 1, all of them used.
        multiplicity: (rows,) int64 training records of every row, at least 1.
        conditions: table ``CONDITIONS``: how many records of a row carry which label or caption;
            empty for unconditional data.
        num_classes: number of classes, None without labels.
        shards: shard that holds the first record of every row, None where it is not known.
        contents: SHA-256 of every row's pixels (``grouping.content_hashes``), by which the same
            image is recognised when it is added; None where it is not known.
    """

    def __init__(
        self,
        keys: list[str],
        group: Tensor,
        multiplicity: Tensor,
        conditions: pa.Table,
        num_classes: int | None,
        shards: list[str | None] | None = None,
        contents: list[str | None] | None = None,
    ):
        self.keys = keys
        self.group = group
        self.multiplicity = multiplicity
        self.conditions = conditions
        self.num_classes = num_classes
        unknown: list[str | None] = [None] * len(keys)
        self.shards = shards if shards is not None else unknown
        self.contents = contents if contents is not None else unknown
        totals = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
        self.group_multiplicity = totals.index_add_(0, group, multiplicity)[group]
        self.label_records = self._label_records()
        self.labels = self._most_frequent_labels()
        self.captions = self._captions()

    def _label_records(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, labels and their records, each (P,) int64, ordered by label, then row; or None.

        A table of all rows and labels would be nearly empty: most images have one label.
        """
        if self.num_classes is None:
            return None
        table = self.conditions.filter(self.conditions["label"].is_valid())
        rows, labels, count = (_tensor(table[name]) for name in ("row", "label", "count"))
        pairs, place = (labels * len(self.keys) + rows).unique(return_inverse=True)
        records = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, place, count)
        return pairs % len(self.keys), pairs // len(self.keys), records

    def _most_frequent_labels(self) -> Tensor | None:
        """(rows,) int64: the label of most records, ties to the lower; 0 of a row without any."""
        if self.label_records is None:
            return None
        rows, labels, records = self.label_records
        best = torch.zeros(len(self.keys), dtype=torch.int64)
        most = best.scatter_reduce(0, rows, records, "amax")
        frequent = records == most[rows]
        # Of the most frequent ones the lowest: no label is above num_classes.
        best.fill_(self.num_classes or 0)
        best.scatter_reduce_(0, rows[frequent], labels[frequent], "amin")
        return best.masked_fill_(most == 0, 0)

    @property
    def label_counts(self) -> Tensor | None:
        """(rows, num_classes) int64, dense: records of each row under each label, or None."""
        if self.label_records is None or self.num_classes is None:
            return None
        rows, labels, records = self.label_records
        counts = torch.zeros(len(self.keys), self.num_classes, dtype=torch.int64)
        counts = counts.to(records.device)
        return counts.index_put_((rows, labels), records)

    def _captions(self) -> list[str] | None:
        table = self.conditions.filter(self.conditions["caption"].is_valid())
        if table.num_rows == 0:
            return None
        best: dict[int, tuple[int, str]] = {}
        columns = [table[name].to_pylist() for name in ("row", "caption", "count")]
        for row, caption, count in zip(*columns, strict=True):
            if row not in best or count > best[row][0]:
                best[row] = (count, caption)
        return [best.get(row, (0, ""))[1] for row in range(len(self.keys))]

    @cached_property
    def caption_counts(self) -> dict[int, dict[str, int]]:
        """By group, how many of its training records carry which caption; rows in order."""
        counts: dict[int, dict[str, int]] = {}
        group = self.group.tolist()
        columns = [self.conditions[name].to_pylist() for name in ("row", "caption", "count")]
        for row, caption, count in zip(*columns, strict=True):
            if caption is not None:
                of_group = counts.setdefault(group[row], {})
                of_group[caption] = of_group.get(caption, 0) + count
        return counts

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        for name in ("group", "multiplicity", "group_multiplicity", "labels"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device))
        if self.label_records is not None:
            rows, labels, records = self.label_records
            self.label_records = rows.to(device), labels.to(device), records.to(device)

    @classmethod
    def merged(
        cls, origin: Origin, row: np.ndarray, group: np.ndarray, hashes: Sequence[str]
    ) -> Items:
        """Add up what is known of images that share a row.

        Args:
            origin: the N images.
            row: (N,) row of every image, numbered by first appearance.
            group: (rows,) group of every row.
            hashes: content hash of every image.
        """
        _, first = np.unique(row, return_index=True)
        keys = [origin.keys[i] for i in first]
        multiplicity = torch.zeros(len(first), dtype=torch.int64)
        multiplicity.index_add_(0, torch.from_numpy(row), origin.counts)
        totals: dict[tuple[int, int | None, str | None], int] = {}
        for position, label, caption, count in origin.conditions:
            condition = (int(row[position]), label, caption)
            totals[condition] = totals.get(condition, 0) + count
        conditions = conditions_table(totals, keys)
        shards = [origin.shards[i] for i in first]
        group_numbers = torch.from_numpy(group)
        contents: list[str | None] = [hashes[i] for i in first]
        return cls(
            keys, group_numbers, multiplicity, conditions, origin.num_classes, shards, contents
        )


def conditions_table(
    totals: Mapping[tuple[int, int | None, str | None], int], keys: Sequence[str]
) -> pa.Table:
    """Table ``CONDITIONS`` of records by (row, label, caption), in the order of the rows.

    Args:
        totals: how many records of a row carry which label and caption.
        keys: image key of every row.
    """
    ordered = sorted(totals, key=lambda condition: condition[0])
    return pa.table(
        {
            "row": [condition[0] for condition in ordered],
            "image_key": [keys[condition[0]] for condition in ordered],
            "label": [condition[1] for condition in ordered],
            "caption": [condition[2] for condition in ordered],
            "count": [totals[condition] for condition in ordered],
        },
        schema=CONDITIONS,
    )


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.int64))


if TYPE_CHECKING:
    pass


def duplicated_captions(
    items: Items, rows: Tensor, policy: CaptionPolicy = "nearest", m: int = 20
) -> list[str]:
    """Caption of what each query is suspected to copy.

    ``nearest`` is the paper's: the caption of the nearest image. ``most_common`` is the authors'
    code's: the caption of most neighbours, if it is that of more than m, else the nearest image's.
    The authors' neighbours are records, each copy of an image one of them; here copies are one row
    with a count, and of near copies only the nearest is returned. So a neighbour counts with all
    training records of its group under each of their captions. Of captions that are equally common
    the one of the nearer image is taken.

    Args:
        items: what the index knows of its rows.
        rows: (B, k) rows that a search returned, nearest first.
        policy: see above.
        m: how many records must have the most common caption for it to count; 20 of 1000
            neighbours in the authors' code.

    Returns:
        B captions; an image without any gives that of its group's most records, or "".

    Raises:
        ValueError: the index has no captions, the rows are not (B, k) with k ≥ 1, or m < 0.
    """
    if items.captions is None:
        raise ValueError("the index has no captions: build it from captioned images")
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows must be (B, k) as a search returns them, not {tuple(rows.shape)}")
    if m < 0:
        raise ValueError(f"m is {m}, but must be 0 or more")
    if policy == "nearest":
        rows = rows[:, :1]
    # Of these rows alone: an index may have millions.
    rows = rows.to(items.group.device)
    captions = []
    # Both in one copy, for which the host waits.
    for neighbours, numbers in zip(*torch.stack([rows, items.group[rows]]).tolist(), strict=True):
        caption = items.captions[neighbours[0]]
        if not caption:
            caption = _most_common(items, numbers[:1])[0]
        if policy == "most_common":
            best, records = _most_common(items, numbers)
            if records > m:
                caption = best
        captions.append(caption)
    return captions


def _most_common(items: Items, groups: list[int]) -> tuple[str, int]:
    """The caption of most records of some groups, nearest first, and how many; ("", 0) of none."""
    counts: dict[str, int] = {}
    for number in dict.fromkeys(groups):
        for caption, count in items.caption_counts.get(number, {}).items():
            if caption:
                counts[caption] = counts.get(caption, 0) + count
    # max keeps the first of equals, and dicts keep the order of the neighbours.
    best = max(counts, key=lambda caption: counts[caption], default="")
    return best, counts.get(best, 0)
