"""Build a dataset folder: ingest, group, split, duplicate, write shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from memfree.data.dataset_folder import dataset_hash
from memfree.data.duplicates import distinct, group, near_pairs
from memfree.data.duplication_plan import DuplicationPlan
from memfree.data.ingest import Framing, Ingested, ingest
from memfree.data.options import LabelPolicy
from memfree.data.random_streams import Stream, generator_of
from memfree.data.shard_writer import (
    CONDITIONS_SCHEMA,
    ITEMS_SCHEMA,
    RECORDS_SCHEMA,
    Record,
    ShardWriter,
    record_bytes,
)
from memfree.data.skipped import Skipped
from memfree.data.sources import Source
from memfree.data.split import PARTS, PartName, PartSizes, deal, limited
from memfree.folders.atomic import check_free_space


def build(
    folder: Path,
    source: Source,
    framing: Framing,
    parts: PartSizes,
    plan: DuplicationPlan,
    seed: int,
    near_distance: float,
    records_per_shard: int,
    skipped: Skipped | None,
    progress: Progress,
    limit: int = 0,
    labels: LabelPolicy = "own",
) -> dict[str, Any]:
    """Read, group, split, repeat and write images; returns the manifest's fields."""
    scratch = folder / "pixels.tmp"
    task = progress.add_task("read", total=source.size[0] or None)
    data = ingest(source, framing, scratch, skipped, lambda name: progress.advance(task))
    count = len(data.names)
    progress.update(task, total=count)
    counts = parts.counts(count, source.default_sizes)

    image_of, pairs = _compare(data, near_distance, progress)
    group_of = _joined(pairs, zip(data.groups, image_of.tolist(), strict=True), image_of)
    image_groups = group_of[image_of]
    families = zip(data.families, image_groups.tolist(), strict=True)
    family_of = _joined(np.empty((0, 2), np.int64), families, image_groups)
    sizes = np.bincount(image_groups)
    family_sizes = np.bincount(family_of, sizes).astype(np.int64)
    part_of_family = deal(family_sizes, counts, seed)
    if limit:
        part_of_family = limited(part_of_family, family_sizes, limit, seed)
    part_of = [part_of_family[family] for family in family_of.tolist()]
    classes = data.num_classes(source.class_names)
    items = arrange(data, image_of, group_of, part_of, plan, classes, seed, labels)
    for part in PARTS:
        if counts[part] and not items.records[part]:
            raise ValueError(
                f"no group of images is small enough for --parts.{part} {counts[part]}; "
                "make it larger or lower --near_distance"
            )

    total = sum(len(records) for records in items.records.values())
    check_free_space(folder, total * record_bytes(int(np.prod(data.pixels.shape[1:]))))
    writer = _write_shards(folder, items, data, records_per_shard, progress)
    _write_tables(folder, items, writer)
    shards = {shard.name: shard.sha256 for shard in writer.shards}
    facts: dict[str, Any] = {
        "source_hash": data.source_hash,
        "hash": dataset_hash(shards, items.keys, items.groups, items.copies()),
        "image_shape": [int(side) for side in data.pixels.shape[1:]],
        "num_classes": items.num_classes,
        "class_names": source.class_names,
        "captions": data.captions is not None,
        "parts": {part: _part_facts(items, part, counts[part]) for part in PARTS},
        "grouping": {
            "source_images": count,
            "exact_duplicates": count - len(group_of),
            "near_pairs": len(pairs),
            "largest_group": int(sizes.max()),
            "largest_family": int(family_sizes.max()),
            "left_out": int(sum(sizes[number] for number, p in enumerate(part_of) if p is None)),
        },
        "repeated_images": items.repeated,
        "left_out": source.left_out.counts(),
        "skipped": {
            "images": skipped.records if skipped else 0,
            "shards": sorted(skipped.shards) if skipped else [],
            "first": skipped.messages if skipped else [],
        },
        "shards": {
            shard.name: {"records": shard.records, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in writer.shards
        },
    }
    del data  # the scratch file is mapped
    scratch.unlink()
    return facts


def _compare(
    data: Ingested, near_distance: float, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    task = progress.add_task("compare", total=len(data.names))
    image_of, first = distinct(data.pixels)
    pairs = near_pairs(
        data.pixels if len(first) == len(data.pixels) else data.pixels[first],
        near_distance,
        lambda done, total: progress.update(task, completed=done, total=total),
    )
    progress.update(task, completed=len(first), total=len(first))
    return image_of, pairs


def _joined(
    pairs: np.ndarray, named: Iterable[tuple[str | None, int]], numbers: np.ndarray
) -> np.ndarray:
    """Group of each of ``numbers``: joins pairs, and images of the same name."""
    leader: dict[str, int] = {}
    links = [
        (leader.setdefault(name, number), number) for name, number in named if name is not None
    ]
    links_and_pairs = np.concatenate([pairs, np.array(links, np.int64).reshape(-1, 2)])
    count = int(numbers.max()) + 1
    return group(count, links_and_pairs, [None] * count)


@dataclass
class Items:
    """Distinct images of a dataset and their records."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    parts: list[PartName] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    """Source image that has these pixels, -1 for a near copy."""
    near_copies: dict[int, np.ndarray] = field(default_factory=dict)
    records: dict[PartName, list[Record]] = field(default_factory=dict)
    num_classes: int | None = None
    repeated: int = 0
    """Images that the plan repeats."""

    def add(self, key: str, group: str, part: PartName, source: int) -> int:
        """Append a distinct image and return its row."""
        self.keys.append(key)
        self.groups.append(group)
        self.parts.append(part)
        self.sources.append(source)
        return len(self.keys) - 1

    def copies(self) -> list[int]:
        """Number of records of each row."""
        count = Counter(record.row for records in self.records.values() for record in records)
        return [count[row] for row in range(len(self.keys))]


def arrange(
    data: Ingested,
    image_of: np.ndarray,
    group_of: np.ndarray,
    part_of: list[PartName | None],
    plan: DuplicationPlan,
    num_classes: int | None,
    seed: int,
    labels: LabelPolicy = "own",
) -> Items:
    """Shuffle the records of each part, near copies last; held-out labels depend on ``labels``.

    ``image_of`` (N,): distinct image of each source image; ``group_of`` (M,), ``part_of`` (G,).
    """
    order = generator_of(seed, Stream.SOURCE_ORDER).permutation(len(image_of)).tolist()
    group_names: dict[int, str] = {}  # what the source calls it, otherwise its first image's key
    for source, image in enumerate(image_of.tolist()):
        name = data.groups[source] or data.names[source]
        group_names.setdefault(int(group_of[image]), name)
    first_of = np.unique(image_of, return_index=True)[1]
    items = Items(num_classes=num_classes)
    row_of: dict[int, int] = {}
    copies: Counter[int] = Counter()
    for part in PARTS:
        records = items.records[part] = []
        for source in order:
            image = int(image_of[source])
            group = int(group_of[image])
            if part_of[group] != part:
                continue
            if image not in row_of:
                first = int(first_of[image])
                row_of[image] = items.add(data.names[first], group_names[group], part, first)
            label = None
            if data.labels is not None and (part == "train" or labels == "own"):
                label = data.labels[source]
            caption = data.captions[source] if data.captions is not None else None
            records.append(Record(row_of[image], copies[image], label, caption))
            copies[image] += 1
    _repeat(items, data, plan, labels, seed)
    shuffle = generator_of(seed, plan.seed, Stream.RECORD_ORDER)
    train = items.records["train"]
    items.records["train"] = [train[number] for number in shuffle.permutation(len(train))]
    return items


def _repeat(
    items: Items, data: Ingested, plan: DuplicationPlan, policy: LabelPolicy, seed: int
) -> None:
    train = items.records["train"]
    alone = Counter(items.groups[record.row] for record in train)
    places = [place for place, record in enumerate(train) if alone[items.groups[record.row]] == 1]
    labels = [label for place in places if (label := train[place].label) is not None]
    factors = plan.factors(range(len(places)), labels if data.labels is not None else None)
    items.repeated = sum(factor > 1 for factor in factors.values())
    # After the choice, so that the same images are repeated under all labels.
    train[:], items.num_classes = _relabelled(train, policy, items.num_classes, seed)
    conditions = _Conditions(items, data, plan, train)
    originals = {position: train[places[position]] for position in factors}
    for position, factor in factors.items():
        original = originals[position]
        if factor > 1:
            original = train[places[position]] = conditions.original(original)
        source = items.sources[original.row]
        pixels = np.asarray(data.pixels[source])
        known = {_digest(pixels): original.row}
        for number in range(1, factor):
            changed = plan.copy(pixels, source, number)
            digest = _digest(changed)
            if digest not in known:
                key = f"{items.keys[original.row]}~{number}"
                known[digest] = items.add(key, items.groups[original.row], "train", -1)
                items.near_copies[known[digest]] = np.ascontiguousarray(changed)
            train.append(Record(known[digest], number, *conditions.of(original)))
    items.num_classes = conditions.num_classes


def _relabelled(
    records: Sequence[Record], policy: LabelPolicy, num_classes: int | None, seed: int
) -> tuple[list[Record], int | None]:
    """Labels own, random or unique (Gu et al., 2023, "On Memorization in Diffusion Models")."""
    if policy == "own":
        return list(records), num_classes
    if num_classes is None:
        raise ValueError(f"--labels {policy} needs a source with labels")
    rows = list(dict.fromkeys(record.row for record in records))
    drawn = list(range(len(rows)))
    if policy == "unique":
        num_classes = len(rows)
    else:
        generator = generator_of(seed, Stream.LABELS)
        drawn = generator.integers(num_classes, size=len(rows)).tolist()
    label_of = dict(zip(rows, drawn, strict=True))
    return [replace(record, label=label_of[record.row]) for record in records], num_classes


class _Conditions:
    def __init__(
        self, items: Items, data: Ingested, plan: DuplicationPlan, train: list[Record]
    ) -> None:
        self._plan, self._policy = plan, plan.conditions
        self.num_classes = items.num_classes
        self._base = items.num_classes or 0
        self._train = list(train)
        self._generator = generator_of(plan.seed, Stream.CONDITIONS)
        self._unique = 0
        self._sources = items.sources
        self._words: set[str] = set()  # of all captions, and those that were made up
        if self._policy == "key":
            self._words.update(" ".join(data.captions or []).lower().split())
        if self._policy != "same" and data.labels is None and data.captions is None:
            raise ValueError(f"--plan.conditions {self._policy} needs labels or captions")
        if self._policy == "varied" and data.labels is not None and self._base < 2:
            raise ValueError("--plan.conditions varied needs two classes or more")

    def original(self, record: Record) -> Record:
        if self._policy != "key":
            return record
        label, caption = record.label, record.caption
        if label is not None:
            label = self._new_label()
        if caption is not None:
            caption = f"{caption} {self._new_word(self._sources[record.row])}"
        return replace(record, label=label, caption=caption)

    def of(self, original: Record) -> tuple[int | None, str | None]:
        label, caption = original.label, original.caption
        if self._policy == "varied":
            if label is not None:
                label = (label + int(self._generator.integers(1, self._base))) % self._base
            if caption is not None:
                caption = self._other_caption(original)
        elif self._policy == "unique":
            if label is not None:
                label = self._new_label()
            self._unique += 1
            if caption is not None:
                caption = f"{caption} {self._unique}"
        return label, caption

    def _new_label(self) -> int:
        label = self.num_classes or 0
        self.num_classes = label + 1
        return label

    def _new_word(self, image: int) -> str:
        """An image's made-up word, which no caption contains and no other image has."""
        attempt = 0
        while (word := self._plan.word(image, attempt)) in self._words:
            attempt += 1
        self._words.add(word)
        return word

    def _other_caption(self, original: Record) -> str | None:
        if len({record.row for record in self._train}) < 2:
            raise ValueError("--plan.conditions varied needs two training images or more")
        while True:
            record = self._train[int(self._generator.integers(len(self._train)))]
            if record.row != original.row:
                return record.caption


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(pixels.tobytes()).digest()


def _part_facts(items: Items, part: PartName, requested: int) -> dict[str, int]:
    rows = [row for row, name in enumerate(items.parts) if name == part]
    return {
        "records": len(items.records[part]),
        "images": len(rows),
        "groups": len({items.groups[row] for row in rows}),
        "requested": requested,
    }


def _write_shards(
    folder: Path, items: Items, data: Ingested, records_per_shard: int, progress: Progress
) -> ShardWriter:
    total = sum(len(records) for records in items.records.values())
    task = progress.add_task("write", total=total)
    writer = ShardWriter(folder, records_per_shard)
    for part in PARTS:
        for record in items.records[part]:
            row = record.row
            pixels = items.near_copies.get(row)
            if pixels is None:
                pixels = np.asarray(data.pixels[items.sources[row]])
            writer.write(part, record, pixels, items.keys[row], items.groups[row])
            progress.advance(task)
    writer.close()
    return writer


def _write_tables(folder: Path, items: Items, writer: ShardWriter) -> None:
    number_of = Counter(
        (record.row, record.label, record.caption)
        for records in items.records.values()
        for record in records
    )
    conditions = [
        (items.keys[row], label, caption, number, items.parts[row])
        for (row, label, caption), number in sorted(number_of.items(), key=lambda item: item[0][0])
    ]
    rows = zip(items.keys, items.groups, items.copies(), items.parts, strict=True)
    for name, schema, table in (
        ("items", ITEMS_SCHEMA, list(rows)),
        ("conditions", CONDITIONS_SCHEMA, conditions),
        ("records", RECORDS_SCHEMA, writer.index),
    ):
        columns = dict(zip(schema.names, zip(*table, strict=True), strict=True))
        pq.write_table(pa.table(columns, schema=schema), folder / f"{name}.parquet")
