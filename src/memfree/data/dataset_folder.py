"""Dataset folder: its manifest, tables and fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memfree.console import counted
from memfree.data.skipped import Skipped
from memfree.data.split import PARTS, PartName
from memfree.folders.manifest import read_manifest, sha256
from memfree.folders.untrusted import read_table, short
from memfree.images import MAX_PIXELS, from_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from memfree.data.record_reader import RecordReader
    from memfree.data.sources import SourceImage


def dataset_hash(
    shards: dict[str, str], keys: list[str], groups: list[str], copies: list[int]
) -> str:
    """SHA-256 over the shards' hashes and the items.

    Args:
        shards: SHA-256 of each shard by its name.
        keys: of the items.
        groups: of the items.
        copies: of the items.
    """
    value = [sorted(shards.items()), keys, groups, copies]
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


class SourceHash:
    """SHA-256 over all that a dataset takes from its source: pictures, keys, classes, captions.

    Feed it every image in the order of the source. Files that are packed or dated otherwise give
    the same hash, if the images in them are the same.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: SourceImage) -> None:
        """Take the next image, undecoded."""
        data = image.pixels
        shape = None if isinstance(data, bytes) else list(data.shape)
        content = hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()
        about = [image.name, image.label, image.caption, image.group, image.family]
        self._digest.update(json.dumps([*about, shape, content]).encode())

    def hexdigest(self, class_names: Sequence[str] | None) -> str:
        """The hash, with the names of the classes."""
        digest = self._digest.copy()
        digest.update(json.dumps(list(class_names or ())).encode())
        return digest.hexdigest()


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and times of files: while it is the same, so is what they hold.

    A file that is written again has another time of change, whatever its owner says of its age.
    """
    value: list[list[str | int]] = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            value.append([os.fspath(file)])
            continue
        times = [found.st_mtime_ns, found.st_ctime_ns]
        value.append([os.fspath(file), found.st_size, found.st_ino, *times])
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_SIZES = range(1 << 62)  # of shards and their members, bytes
_MAX_CLASSES = 1 << 24  # more than the classes of any source, one for each of their copies too
_BLOCK = 1024  # images decoded at a time
_log = logging.getLogger(__name__)


class DatasetFolder:
    """Opens a dataset folder that ``memfree prepare`` finished.

    Args:
        path: the folder.
        verify: read every shard and compare its SHA-256, instead of comparing sizes only.
        on_error: stop at a missing or damaged shard, or say so and go on without it.

    Attributes:
        path: the folder.
        manifest: its ``manifest.json``.
        hash: SHA-256 over the shards' hashes and the items: the identity of the dataset.
        image_shape: (C, H, W) of all images.
        num_classes: number of labels, None without labels.
        items: table ``image_key, group, copies, part``; its row numbers are the ``row`` of
            batches.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: it is unfinished, of another kind, or not what its manifest says.
    """

    def __init__(
        self, path: Path, verify: bool = False, on_error: Literal["stop", "skip"] = "stop"
    ) -> None:
        from memfree.data.shard_writer import ITEMS_SCHEMA

        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path, "dataset")
        try:
            self.image_shape = _shape(self.manifest["image_shape"])
            self.num_classes = _classes(self.manifest["num_classes"])
            self.hash: str = self.manifest["hash"]
            shards = {name: (v["bytes"], v["sha256"]) for name, v in self._shards().items()}
            self._count = sum(part["records"] for part in self.manifest["parts"].values())
        except KeyError as error:
            raise ValueError(
                f"{self.path}/manifest.json lacks {error}; prepare it again"
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.path}/manifest.json is damaged ({short(error)}); prepare it again"
            ) from error
        self.items = self._table("items.parquet", ITEMS_SCHEMA)
        skipped = Skipped()
        for name, problem in self._problems(shards, verify):
            if on_error == "stop":
                raise ValueError(f"{problem}; prepare the dataset again")
            skipped.shard(name, problem)
        if skipped:
            _log.warning("%s; first: %s", skipped.text(), skipped.messages[0])
        columns = (self.items[name].to_pylist() for name in ("image_key", "group", "copies"))
        if dataset_hash({name: digest for name, (_, digest) in shards.items()}, *columns) != (
            self.hash
        ):
            raise ValueError(
                f"{self.path} was changed after it was prepared: items and shards do not have the "
                "hash of its manifest; prepare it again"
            )

    def _shards(self) -> dict[str, dict[str, Any]]:
        return self.manifest["shards"]

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        path = self.path / name
        try:
            return read_table(path, schema, nullable=("label", "caption"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; prepare the dataset again") from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged; prepare the dataset again: {error}") from error

    def _check(self, name: str, table: pa.Table, sound: dict[str, range]) -> None:
        """Refuse a table with a number out of its range, or labels that are no classes."""
        import pyarrow.compute as pc

        ranges = {**sound, "label": range(self.num_classes or 0)}
        for column in ranges.keys() & set(table.column_names):
            found = pc.min_max(table[column]).as_py()
            low, high = found["min"], found["max"]
            if low is not None and (low not in ranges[column] or high not in ranges[column]):
                raise ValueError(
                    f"{self.path}/{name} does not belong to its manifest: {column} of "
                    f"{low} to {high}; prepare the dataset again"
                )

    def _problems(
        self, shards: dict[str, tuple[int, str]], verify: bool
    ) -> Iterator[tuple[str, str]]:
        """(shard, what is wrong with it)."""
        for name, (size, digest) in shards.items():
            path = self.path / name
            if Path(name).name != name or name in ("", "..") or not name.isprintable():
                raise ValueError(f"{self.path}/manifest.json: {short(repr(name))} is no shard name")
            if not path.is_file():
                yield name, f"shard {path} is missing"
                continue
            found = path.stat().st_size
            if found != size:
                yield (
                    name,
                    f"shard {path} has {counted(found, 'byte')}, its manifest says {short(size)}",
                )
            elif verify and sha256(path) != digest:
                yield name, f"shard {path} does not have the SHA-256 of its manifest"

    @cached_property
    def records(self) -> pa.Table:
        """All records: ``part, record, row, copy, label, caption, shard, offset, size, crc32``."""
        import pyarrow.compute as pc

        from memfree.data.shard_writer import RECORDS_SCHEMA

        table = self._table("records.parquet", RECORDS_SCHEMA)
        names, rows = pc.unique(table["shard"]).to_pylist(), pc.unique(table["row"])
        trained = table.filter(pc.field("part") == "train")  # held-out images may have no label
        if (
            not self._shards().keys() >= set(names)  # a name from a file opens no other file
            or len(table) != self._count
            or len(rows) != len(self.items)  # every image has a record
            or (self.num_classes is not None and trained["label"].null_count)
        ):
            raise ValueError(f"{self.path}/records.parquet does not belong to its manifest")
        ranges = {"row": range(len(self.items)), "offset": _SIZES, "size": _SIZES}
        self._check("records.parquet", table, ranges)
        if not pc.all(pc.equal(table["part"], self.items["part"].take(table["row"]))).as_py():
            raise ValueError(
                f"{self.path}/records.parquet is damaged: a record is of another part than its "
                "image; prepare the dataset again"
            )
        return table

    @cached_property
    def conditions(self) -> pa.Table:
        """``image_key, label, caption, count, part``: records of each image and condition."""
        import pyarrow.compute as pc

        from memfree.data.shard_writer import CONDITIONS_SCHEMA

        table = self._table("conditions.parquet", CONDITIONS_SCHEMA)
        self._check("conditions.parquet", table, {"count": range(1, self._count + 1)})
        if pc.any(pc.invert(pc.is_in(table["image_key"], self.items["image_key"]))).as_py():
            raise ValueError(f"{self.path}/conditions.parquet names an image that is no item")
        return table

    def part_records(self, part: PartName) -> pa.Table:
        """The rows of :attr:`records` of one part, in the order of the shards."""
        import pyarrow.compute as pc

        return self.records.filter(pc.field("part") == part).combine_chunks()

    def part(self, name: PartName) -> DatasetPart:
        """The distinct images of one part.

        Raises:
            ValueError: there is no such part, or it is empty.
        """
        import pyarrow.compute as pc
        import torch

        from memfree.data.record_reader import RecordReader

        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of a dataset; use one of {', '.join(PARTS)}")
        rows = pc.indices_nonzero(pc.equal(self.items["part"], name)).to_numpy().astype("int64")
        if len(rows) == 0:
            raise ValueError(
                f"{self.path} has no {name} images; prepare it again with --parts.{name}"
            )
        records = self.part_records(name)
        first: dict[int, int] = {}
        for position, row in enumerate(records["row"].to_pylist()):
            first.setdefault(row, position)
        firsts = records.take([first[row] for row in rows.tolist()])
        items = self.items.take(rows)
        labels = firsts["label"]
        # Held-out images have none where training labels say nothing of the image.
        labelled = self.num_classes is not None and labels.null_count == 0
        captions = firsts["caption"]
        return DatasetPart(
            name=name,
            keys=items["image_key"].to_pylist(),
            groups=items["group"].to_pylist(),
            copies=torch.tensor(items["copies"].to_pylist(), dtype=torch.int64),
            labels=torch.tensor(labels.to_pylist()) if labelled else None,
            captions=captions.to_pylist() if captions.null_count == 0 else None,
            conditions=self.conditions.filter(pc.field("part") == name),
            rows=torch.from_numpy(rows),
            reader=RecordReader(self.path, firsts, self.image_shape),
        )


@dataclass
class DatasetPart:
    """The distinct images of one part, each once, in a fixed order.

    Near copies (crop, flip, brightness, JPEG) are distinct images with a key of their own, in the
    group of their original; exact copies share the key.
    """

    name: PartName
    keys: list[str]
    groups: list[str]
    """Of each image: declared by the source, or found by content."""
    copies: Tensor
    """(N,) int64: records of exactly that image, 1 = not repeated."""
    labels: Tensor | None
    """(N,) int64: label of the image's first record; None without labels."""
    captions: list[str] | None
    """Caption of the image's first record; None without captions."""
    conditions: pa.Table
    """``image_key, label, caption, count, part``: all conditions with their numbers of records."""
    rows: Tensor
    """(N,) int64: rows of the dataset's ``items``."""
    reader: RecordReader

    def __len__(self) -> int:
        return len(self.keys)

    def images(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [-1, 1]."""
        import torch

        images = torch.empty(0)
        for start, batch in enumerate(self.batches(_BLOCK)):
            if start == 0:  # the manifest's shape is that of an image, so there is memory for it
                images = torch.empty(len(self), *self.reader.image_shape)
            images[start * _BLOCK : (start + 1) * _BLOCK] = batch
        return images

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, (batch_size, C, H, W) float32 in [-1, 1]; the last may be fewer."""
        for start in range(0, len(self), batch_size):
            yield from_bytes(self.reader.read(range(start, min(start + batch_size, len(self)))))


def _shape(value: Any) -> tuple[int, int, int]:
    """(C, H, W), refused if no image is of it."""
    channels, height, width = value
    if not all(type(side) is int and side > 0 for side in value) or (
        channels > 4 or height * width > MAX_PIXELS
    ):
        raise ValueError(f"image_shape {short(value)}")
    return channels, height, width


def _classes(value: Any) -> int | None:
    if value is not None and not (type(value) is int and 0 < value <= _MAX_CLASSES):
        raise ValueError(f"num_classes {short(value)}")
    return value
