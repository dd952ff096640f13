"""What an index knows of its rows besides their vectors: keys, groups, counts, conditions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.retrieval.grouping import content_hashes, joined, near_copies, numbered

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
    """

    def __init__(
        self,
        keys: list[str],
        group: Tensor,
        multiplicity: Tensor,
        conditions: pa.Table,
        num_classes: int | None,
        shards: list[str | None] | None = None,
    ):
        self.keys = keys
        self.group = group
        self.multiplicity = multiplicity
        self.conditions = conditions
        self.num_classes = num_classes
        self.shards = shards if shards is not None else [None] * len(keys)
        totals = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
        self.group_multiplicity = totals.index_add_(0, group, multiplicity)[group]
        self.label_counts = self._label_counts()
        # argmax returns the first maximum, so ties go to the lower label.
        self.labels = None if self.label_counts is None else self.label_counts.argmax(1)
        self.captions = self._captions()

    def _label_counts(self) -> Tensor | None:
        if self.num_classes is None:
            return None
        table = self.conditions.filter(self.conditions["label"].is_valid())
        counts = torch.zeros(len(self.keys), self.num_classes, dtype=torch.int64)
        rows, labels, count = (_tensor(table[name]) for name in ("row", "label", "count"))
        return counts.index_put_((rows, labels), count, accumulate=True)

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

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        for name in ("group", "multiplicity", "group_multiplicity", "labels", "label_counts"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device))

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
    ) -> tuple[Items, Tensor]:
        """Merge identical images and group near ones; arguments of ``ReferenceIndex.build``.

        Returns:
            the items, and (rows,) the position of every row's first image.
        """
        check_images(images)
        size = len(images)
        lengths = {
            "keys": keys, "groups": groups, "counts": counts, "labels": labels,
            "captions": captions,
        }  # fmt: skip
        for name, value in lengths.items():
            if value is not None and len(value) != size:
                raise ValueError(f"{name} has {len(value)} entries, but there are {size} images")
        keys = list(keys) if keys is not None else [f"image-{i:08d}" for i in range(size)]
        counts = torch.ones(size, dtype=torch.int64) if counts is None else counts.cpu().long()
        if bool((counts < 1).any()):
            raise ValueError("counts must be at least 1: leave images out that are not trained on")

        row = numbered(content_hashes(images))
        _, first = np.unique(row, return_index=True)
        kept = torch.from_numpy(first)
        if groups is None:
            group = joined(len(first), near_copies(images[kept]))
        else:
            names = groups.tolist() if isinstance(groups, Tensor) else groups
            group = _joined_declared(row, numbered(names))
        rows = torch.from_numpy(row)
        multiplicity = torch.zeros(len(first), dtype=torch.int64).index_add_(0, rows, counts)
        row_keys = [keys[i] for i in first]
        conditions = condition_table(row, row_keys, counts, labels, captions)
        num_classes = None if labels is None else _checked_classes(labels, num_classes)
        group_tensor = torch.from_numpy(group)
        return cls(row_keys, group_tensor, multiplicity, conditions, num_classes), kept


def check_images(images: Tensor) -> None:
    """Refuse what cannot be a stack of images (N, C, H, W) in [-1, 1]; one clear ValueError."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W) and not empty, not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be float in [-1, 1], not {images.dtype}: use u8/127.5 - 1")
    low, high = images.aminmax()
    if not (float(low) >= -1.001 and float(high) <= 1.001):  # NaN fails both
        raise ValueError(
            f"images must be in [-1, 1] and finite, but span {float(low):g} … {float(high):g}"
        )


def condition_table(
    row: np.ndarray,
    row_keys: list[str],
    counts: Tensor,
    labels: Tensor | None,
    captions: Sequence[str] | None,
) -> pa.Table:
    """Count the conditions of every row: table ``CONDITIONS``, sorted by row and first use.

    Args:
        row: (N,) row of every image.
        row_keys: key of every row.
        counts: (N,) records of every image.
        labels: (N,) label of every image, or None.
        captions: caption of every image, or None.
    """
    if labels is None and captions is None:
        return CONDITIONS.empty_table()
    label_list = [None] * len(row) if labels is None else labels.tolist()
    caption_list = [None] * len(row) if captions is None else captions
    totals: dict[tuple[int, int | None, str | None], int] = {}
    for entry in zip(row.tolist(), label_list, caption_list, counts.tolist(), strict=True):
        totals[entry[:3]] = totals.get(entry[:3], 0) + entry[3]
    ordered = sorted(totals.items(), key=lambda item: item[0][0])
    return pa.table(
        {
            "row": [key[0] for key, _ in ordered],
            "image_key": [row_keys[key[0]] for key, _ in ordered],
            "label": [key[1] for key, _ in ordered],
            "caption": [key[2] for key, _ in ordered],
            "count": [count for _, count in ordered],
        },
        schema=CONDITIONS,
    )


def _joined_declared(row: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Group of every row, where identical images join the groups that they were declared in."""
    groups = int(group.max()) + 1
    edges = np.unique(np.stack([row + groups, group], axis=1), axis=0)
    component = joined(groups + int(row.max()) + 1, edges)
    return numbered(component[groups:].tolist())


def _checked_classes(labels: Tensor, num_classes: int | None) -> int:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ValueError(
            f"labels span {low} … {high}, but must be in 0 … "
            f"{'num_classes' if num_classes is None else num_classes} - 1"
        )
    return num_classes if num_classes is not None else high + 1


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.int64))
