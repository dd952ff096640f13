"""Records of a dataset: copies, labels and captions as the duplication plan says."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memfree.data.duplication_plan import DuplicationPlan
from memfree.data.ingest import Ingested
from memfree.data.options import LabelPolicy
from memfree.data.random_streams import Stream, generator_of
from memfree.data.shard_writer import Record
from memfree.data.split import PARTS, PartName


def relabelled(
    records: Sequence[Record], policy: LabelPolicy, num_classes: int | None, seed: int
) -> tuple[list[Record], int | None]:
    """Training records under other labels (Gu et al., 2023, "On Memorization in Diffusion Models").

    Args:
        records: of the training part; records of one image get one label.
        policy: own: as they are; random: drawn uniformly from the source's classes whatever the
            image shows; unique: a class of its own for each image.
        num_classes: of the source.
        seed: of the draws.

    Returns:
        The records, and the number of classes they have now.

    Raises:
        ValueError: there are no labels that could be replaced.
    """
    if policy == "own":
        return list(records), num_classes
    if num_classes is None:
        raise ValueError(f"--labels {policy} needs a source with labels")
    rows = list(dict.fromkeys(record.row for record in records))
    if policy == "unique":
        drawn = list(range(len(rows)))
        classes = len(rows)
    else:
        generator = generator_of(seed, Stream.LABELS)
        drawn = generator.integers(num_classes, size=len(rows)).tolist()
        classes = num_classes
    label_of = dict(zip(rows, drawn, strict=True))
    return [replace(record, label=label_of[record.row]) for record in records], classes


@dataclass
class Items:
    """The distinct images of a dataset, and which records are made of them."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    parts: list[PartName] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    """Source image that has these pixels, -1 for a near copy."""
    near_copies: dict[int, np.ndarray] = field(default_factory=dict)
    """Pixels of the rows that are near copies."""
    records: dict[PartName, list[Record]] = field(default_factory=dict)
    num_classes: int | None = None
    repeated: int = 0
    """Images that the plan chose and repeats."""

    def add(self, key: str, group: str, part: PartName, source: int) -> int:
        """Append a distinct image; returns its row."""
        self.keys.append(key)
        self.groups.append(group)
        self.parts.append(part)
        self.sources.append(source)
        return len(self.keys) - 1

    def copies(self) -> list[int]:
        """Records of each row."""
        count = Counter(record.row for records in self.records.values() for record in records)
        return [count[row] for row in range(len(self.keys))]

    def conditions(self) -> list[tuple[int, int | None, str | None, int]]:
        """(row, label, caption, records), in order of rows."""
        count = Counter(
            (record.row, record.label, record.caption)
            for records in self.records.values()
            for record in records
        )
        ordered = sorted(count.items(), key=lambda item: item[0][0])
        return [(row, label, caption, number) for (row, label, caption), number in ordered]


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
    """Lay out the records.

    Args:
        data: the source.
        image_of: (N,) distinct image of each source image.
        group_of: (M,) group of each distinct image.
        part_of: (G,) part of each group.
        plan: copies that the training part gets, after the split.
        num_classes: classes of the source.
        seed: order of images and of records.
        labels: which labels the training images get; held-out images lose theirs where these say
            nothing of the image.

    Returns:
        rows in a random order within each part; near copies come after all originals.
    """
    order = generator_of(seed, Stream.SOURCE_ORDER).permutation(len(image_of)).tolist()
    names = _group_names(data, image_of, group_of)
    first_of = np.unique(image_of, return_index=True)[1]
    items = Items(num_classes=num_classes)
    row_of: dict[int, int] = {}
    copies: Counter[int] = Counter()
    for part in PARTS:
        records = items.records[part] = []
        for source in order:
            image = int(image_of[source])
            if part_of[group_of[image]] != part:
                continue
            if image not in row_of:
                first = int(first_of[image])
                row_of[image] = items.add(data.names[first], names[group_of[image]], part, first)
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


def _group_names(data: Ingested, image_of: np.ndarray, group_of: np.ndarray) -> dict[int, str]:
    """A group is called what its source calls it, otherwise after its first image."""
    names: dict[int, str] = {}
    for source, image in enumerate(image_of.tolist()):
        names.setdefault(int(group_of[image]), data.groups[source] or data.names[source])
    return names


def _repeat(
    items: Items, data: Ingested, plan: DuplicationPlan, policy: LabelPolicy, seed: int
) -> None:
    """Append the plan's copies to the training records, under the labels that ``policy`` gives."""
    train = items.records["train"]
    alone = Counter(items.groups[record.row] for record in train)
    places = [place for place, one in enumerate(train) if alone[items.groups[one.row]] == 1]
    candidates = [train[place] for place in places]
    labels = [record.label for record in candidates if record.label is not None]
    factors = plan.factors(range(len(candidates)), labels if data.labels is not None else None)
    items.repeated = sum(factor > 1 for factor in factors.values())
    # After the choice, so that the same images are repeated under all labels.
    train[:], items.num_classes = relabelled(train, policy, items.num_classes, seed)
    candidates = [train[place] for place in places]
    conditions = _Conditions(items, data, plan, train)
    for position, factor in factors.items():
        original = candidates[position]
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


class _Conditions:
    """Labels and captions of copies."""

    def __init__(
        self, items: Items, data: Ingested, plan: DuplicationPlan, train: list[Record]
    ) -> None:
        self._policy = plan.conditions
        self.num_classes = items.num_classes
        self._base = items.num_classes or 0
        self._captions = [record.caption for record in train]
        self._rows = [record.row for record in train]
        self._generator = generator_of(plan.seed, Stream.CONDITIONS)
        self._unique = 0
        self._sources = items.sources
        self._plan = plan
        self._words: set[str] = set()
        """Words of all captions, and those that were made up."""
        if self._policy == "key":
            self._words.update(
                word for text in data.captions or [] for word in text.lower().split()
            )
        if self._policy != "same" and data.labels is None and data.captions is None:
            raise ValueError(f"--plan.conditions {self._policy} needs labels or captions")
        if self._policy == "varied" and data.labels is not None and self._base < 2:
            raise ValueError("--plan.conditions varied needs two classes or more")

    def original(self, record: Record) -> Record:
        """The record of an image that is repeated: policy ``key`` changes it as well."""
        if self._policy != "key":
            return record
        label, caption = record.label, record.caption
        if label is not None:
            label = self._new_label()
        if caption is not None:
            caption = f"{caption} {self._new_word(self._sources[record.row])}"
        return Record(record.row, record.copy, label, caption)

    def of(self, original: Record) -> tuple[int | None, str | None]:
        """Label and caption of the next copy of ``original``."""
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
        """One more class."""
        label = self.num_classes or 0
        self.num_classes = label + 1
        return label

    def _new_word(self, image: int) -> str:
        """The made-up word of an image, which is in no caption and no other image has."""
        attempt = 0
        while (word := self._plan.word(image, attempt)) in self._words:
            attempt += 1
        self._words.add(word)
        return word

    def _other_caption(self, original: Record) -> str | None:
        if len(set(self._rows)) < 2:
            raise ValueError("--plan.conditions varied needs two training images or more")
        while True:
            number = int(self._generator.integers(len(self._rows)))
            if self._rows[number] != original.row:
                return self._captions[number]


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(pixels.tobytes()).digest()
