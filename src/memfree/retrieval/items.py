"""What an index knows of its rows besides their vectors: keys, groups, counts, conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.retrieval.origin import Origin

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
