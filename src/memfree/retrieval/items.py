"""Items of a reference index: keys, groups, counts and conditions of its rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.retrieval.options import CaptionPolicy

CONDITIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("image_key", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("count", pa.int64()),
    ]
)


@dataclass(eq=False)
class Items:
    """Keys, groups, multiplicities and conditions of an index's rows."""

    keys: list[str]
    """Image key of every row."""
    group: Tensor
    """(rows,) int64 group numbers, 0 to groups − 1, all used."""
    multiplicity: Tensor
    """(rows,) int64 training records of every row, at least 1."""
    conditions: pa.Table
    """``CONDITIONS``: records of a row by label and caption; empty for unconditional data."""
    num_classes: int | None
    shards: list[str | None] = field(default_factory=list)
    """Shard of the first record of every row, None if unknown."""
    contents: list[str | None] = field(default_factory=list)
    """SHA-256 of every row's pixels (``build.content_hashes``), to recognise added copies; or
    None."""

    def __post_init__(self) -> None:
        unknown: list[str | None] = [None] * len(self.keys)
        self.shards, self.contents = self.shards or unknown, self.contents or unknown
        group = self.group
        totals = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
        self.group_multiplicity = totals.index_add_(0, group, self.multiplicity)[group]
        self.label_records = self._label_records()
        self.labels = self._most_frequent_labels()
        self.captions = self._captions()

    def _label_records(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, labels and their records, each (P,) int64, ordered by label, then row; or None."""
        # Not a table of all rows and labels, which would be nearly empty.
        if self.num_classes is None:
            return None
        table = self.conditions.filter(self.conditions["label"].is_valid())
        rows, labels, count = (
            torch.from_numpy(table[name].to_numpy().astype(np.int64))
            for name in ("row", "label", "count")
        )
        pairs, place = (labels * len(self.keys) + rows).unique(return_inverse=True)
        records = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, place, count)
        return pairs % len(self.keys), pairs // len(self.keys), records

    def _most_frequent_labels(self) -> Tensor | None:
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
    def caption_counts(self) -> dict[int, Counter[str]]:
        """Training records by caption for every group; rows in order."""
        counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
        group = self.group.tolist()
        columns = [self.conditions[name].to_pylist() for name in ("row", "caption", "count")]
        for row, caption, count in zip(*columns, strict=True):
            if caption is not None:
                counts[group[row]][caption] += count
        return dict(counts)

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        for name in ("group", "multiplicity", "group_multiplicity", "labels"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device))
        if self.label_records is not None:
            rows, labels, records = self.label_records
            self.label_records = rows.to(device), labels.to(device), records.to(device)


def conditions_table(
    totals: Mapping[tuple[int, int | None, str | None], int], keys: Sequence[str]
) -> pa.Table:
    """Table ``CONDITIONS`` of records by (row, label, caption), in the order of the rows."""
    rows = [
        {"row": row, "image_key": keys[row], "label": label, "caption": caption, "count": count}
        for (row, label, caption), count in sorted(totals.items(), key=lambda item: item[0][0])
    ]
    return pa.Table.from_pylist(rows, schema=CONDITIONS)


def duplicated_captions(
    items: Items, rows: Tensor, policy: CaptionPolicy = "nearest", m: int = 20
) -> list[str]:
    """Caption that each query is suspected to copy, for rows (B, k) of a search, nearest first.

    ``nearest`` is the paper's: the caption of the nearest image. ``most_common`` is the authors'
    code: the caption of most neighbours if more than m (20 of 1000 there) have it, else the nearest
    image's. Their neighbours are records, with copies one by one; here copies are one row with a
    count, and only the nearest of near copies is returned. So a neighbour counts with all training
    records of its group under each of their captions; ties go to the nearer image. An image without
    a caption gives that of most records in its group, or "".
    """
    if items.captions is None:
        raise ValueError("the index has no captions: build it from captioned images")
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows must be (B, k) as a search returns them, not {tuple(rows.shape)}")
    if m < 0:
        raise ValueError(f"m is {m}, but must be 0 or more")
    if policy == "nearest":
        rows = rows[:, :1]
    # Only these rows: an index may have millions.
    rows = rows.to(items.group.device)
    captions = []
    # One copy for both, as the host waits for it.
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
    counts: Counter[str] = Counter()  # in the order of the neighbours, by which ties are decided
    for number in dict.fromkeys(groups):
        counts.update({c: n for c, n in items.caption_counts.get(number, {}).items() if c})
    return counts.most_common(1)[0] if counts else ("", 0)
