"""Dataset folder: its manifest, tables and fingerprint, and the reader of its records."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memfree.console import counted
from memfree.data.skipped import Skipped
from memfree.data.split import PARTS, PartName
from memfree.folders.manifest import read_manifest, sha256
from memfree.folders.untrusted import read_table, short
from memfree.images import MAX_IMAGE_BYTES, MAX_PIXELS, decode_record, from_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from memfree.data.sources import SourceImage


def dataset_hash(
    shards: dict[str, str], keys: list[str], groups: list[str], copies: list[int]
) -> str:
    """SHA-256 over items, and shard hashes by name."""
    value = [sorted(shards.items()), keys, groups, copies]
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


class SourceHash:
    """SHA-256 over a source's pictures, keys, classes and captions, however packed or dated."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: SourceImage) -> None:
        """Add the next image, undecoded."""
        data = image.pixels
        shape = None if isinstance(data, bytes) else list(data.shape)
        content = hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()
        about = [image.name, image.label, image.caption, image.group, image.family]
        self._digest.update(json.dumps([*about, shape, content]).encode())

    def hexdigest(self, class_names: Sequence[str] | None) -> str:
        """Hash including the names of the classes."""
        digest = self._digest.copy()
        digest.update(json.dumps(list(class_names or ())).encode())
        return digest.hexdigest()


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over names, sizes, modification and change times: tells whether files changed."""
    value: list[list[str | int]] = []
    for file in files:
        value.append([os.fspath(file)])
        try:
            stat = os.stat(file)
        except OSError:
            continue
        value[-1] += [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_SIZES = range(1 << 62)  # of shards and their members, bytes
_MAX_CLASSES = 1 << 24  # more than the classes of any source, one for each of their copies too
_BLOCK = 1024  # images decoded at a time
_OPEN_SHARDS = 64
_log = logging.getLogger(__name__)


class DatasetFolder:
    """A dataset folder of ``memfree prepare``.

    Args:
        verify: compare the SHA-256 of every shard instead of its size only.
        on_error: stop at a missing or damaged shard, or warn and continue without it.

    Attributes:
        hash: identity of the dataset, see :func:`dataset_hash`.
        image_shape: (C, H, W) of all images.
        items: table ``image_key, group, copies, part``; batches call its row numbers ``row``.
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
            self._shards = {
                name: (shard["bytes"], shard["sha256"])
                for name, shard in self.manifest["shards"].items()
            }
            self._count = sum(part["records"] for part in self.manifest["parts"].values())
        except KeyError as error:
            raise self._error("manifest.json", f"lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise self._error("manifest.json", f"is damaged ({short(error)})") from error
        self.items = self._table("items.parquet", ITEMS_SCHEMA)
        skipped = Skipped()
        for name, problem in self._problems(verify):
            if on_error == "stop":
                raise ValueError(f"{problem}; prepare the dataset again")
            skipped.shard(name, problem)
        if skipped:
            _log.warning("%s; first: %s", skipped.text(), skipped.messages[0])
        columns = (self.items[name].to_pylist() for name in ("image_key", "group", "copies"))
        digests = {name: digest for name, (_, digest) in self._shards.items()}
        if dataset_hash(digests, *columns) != self.hash:
            raise ValueError(
                f"{self.path} was changed after it was prepared: items and shards do not have the "
                "hash of its manifest; prepare it again"
            )

    def _error(self, file: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}/{file} {problem}; prepare the dataset again")

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        try:
            return read_table(self.path / name, schema, nullable=("label", "caption"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; prepare the dataset again") from error
        except ValueError as error:
            raise self._error(name, f"is damaged ({error})") from error

    def _check(self, name: str, table: pa.Table, ranges: dict[str, range]) -> None:
        import pyarrow.compute as pc

        for column, allowed in {**ranges, "label": range(self.num_classes or 0)}.items():
            low, high = pc.min_max(table[column]).as_py().values()
            if low is not None and (low not in allowed or high not in allowed):
                problem = f"does not belong to its manifest: {column} of {low} to {high}"
                raise self._error(name, problem)

    def _problems(self, verify: bool) -> Iterator[tuple[str, str]]:
        for name, (size, digest) in self._shards.items():
            path = self.path / name
            if Path(name).name != name or name in ("", "..") or not name.isprintable():
                raise self._error("manifest.json", f"names {short(repr(name))}, not a shard")
            if not path.is_file():
                yield name, f"shard {path} is missing"
            elif (actual := path.stat().st_size) != size:
                stated = f"its manifest says {short(size)}"
                yield name, f"shard {path} has {counted(actual, 'byte')}, {stated}"
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
            not self._shards.keys() >= set(names)  # a name from a file opens no other file
            or len(table) != self._count
            or len(rows) != len(self.items)  # every image has a record
            or (self.num_classes is not None and trained["label"].null_count)
        ):
            raise self._error("records.parquet", "does not belong to its manifest")
        ranges = {"row": range(len(self.items)), "offset": _SIZES, "size": _SIZES}
        self._check("records.parquet", table, ranges)
        if not pc.all(pc.equal(table["part"], self.items["part"].take(table["row"]))).as_py():
            problem = "is damaged: a record is of another part than its image"
            raise self._error("records.parquet", problem)
        return table

    @cached_property
    def conditions(self) -> pa.Table:
        """``image_key, label, caption, count, part``: records of each image and condition."""
        import pyarrow.compute as pc

        from memfree.data.shard_writer import CONDITIONS_SCHEMA

        table = self._table("conditions.parquet", CONDITIONS_SCHEMA)
        self._check("conditions.parquet", table, {"count": range(1, self._count + 1)})
        if pc.any(pc.invert(pc.is_in(table["image_key"], self.items["image_key"]))).as_py():
            raise self._error("conditions.parquet", "names an image that is not an item")
        return table

    def part_records(self, part: PartName) -> pa.Table:
        """Rows of :attr:`records` of one part, in shard order."""
        import pyarrow.compute as pc

        return self.records.filter(pc.field("part") == part).combine_chunks()

    def part(self, name: PartName) -> DatasetPart:
        """The distinct images of one part; ValueError if there are none."""
        import pyarrow.compute as pc
        import torch

        if name not in PARTS:
            raise ValueError(f"{name!r} is not a part of a dataset; use one of {', '.join(PARTS)}")
        rows = pc.indices_nonzero(pc.equal(self.items["part"], name)).to_numpy().astype("int64")
        if len(rows) == 0:
            raise ValueError(
                f"{self.path} has no {name} images; prepare it again with --parts.{name}"
            )
        records = self.part_records(name)
        present, first = np.unique(records["row"].to_numpy(), return_index=True)
        assert np.array_equal(present, rows)  # every image has a record
        firsts, items = records.take(first), self.items.take(rows)
        labels, captions = firsts["label"], firsts["caption"]
        # Held-out images have none where training labels say nothing of the image.
        labelled = self.num_classes is not None and labels.null_count == 0
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
    """Distinct images of one part, each once, in a fixed order; near copies have their own keys."""

    name: PartName
    keys: list[str]
    groups: list[str]
    """Group of each image, declared by the source or found by content."""
    copies: Tensor
    """(N,) int64: records of exactly that image, 1 = not repeated."""
    labels: Tensor | None
    """(N,) int64: label of the image's first record; None without labels."""
    captions: list[str] | None
    """Caption of the image's first record; None without captions."""
    conditions: pa.Table
    """``image_key, label, caption, count, part``: all conditions with their record counts."""
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
        """Images in order, (batch_size, C, H, W) float32 in [-1, 1]; the last may be fewer."""
        for start in range(0, len(self), batch_size):
            yield from_bytes(self.reader.read(range(start, min(start + batch_size, len(self)))))


class RecordReader:
    """Decoded images of index rows (``shard, offset, size, crc32, row``), in any process.

    Images are cached, one for all exact copies, if all take at most ``cache_bytes``.
    """

    def __init__(
        self,
        folder: Path,
        records: pa.Table,
        image_shape: tuple[int, int, int],
        cache_bytes: int = 0,
    ) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()
        self._folder = folder
        self.image_shape = image_shape
        self._names: list[str] = records["shard"].unique().to_pylist()
        number = {name: position for position, name in enumerate(self._names)}
        self._shard = np.array([number[name] for name in records["shard"].to_pylist()], np.int64)
        self._offset, self._size, self._crc32, row = (
            records[name].to_numpy() for name in ("offset", "size", "crc32", "row")
        )
        distinct, self._slot = np.unique(row, return_inverse=True)
        self._cached: np.ndarray | None = None
        if 0 < len(distinct) * int(np.prod(image_shape)) <= cache_bytes:
            self._cached = np.empty((len(distinct), *image_shape), np.uint8)
            self._filled = np.zeros(len(distinct), bool)

    def __len__(self) -> int:
        return len(self._slot)

    def read(
        self, numbers: Iterable[int], broken: Callable[[int, str], None] | None = None
    ) -> Tensor:
        """Images of these index positions, (n, C, H, W) uint8; ``broken`` gets unreadable ones."""
        import torch

        images = []
        for number in numbers:
            try:
                images.append(self._image(number))
            except (ValueError, OSError) as error:
                if broken is None:
                    raise
                broken(number, str(error))
        if not images:
            return torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return torch.from_numpy(np.stack(images))

    def _image(self, number: int) -> np.ndarray:
        if self._cached is None:
            return self._decode(number)
        slot = self._slot[number]
        if not self._filled[slot]:
            self._cached[slot] = self._decode(number)
            self._filled[slot] = True
        image: np.ndarray = self._cached[slot]
        return image

    def _decode(self, number: int) -> np.ndarray:
        shard, offset, size = (int(of[number]) for of in (self._shard, self._offset, self._size))
        name = f"{self._folder / self._names[shard]}, record {number}"
        if not 0 < size <= MAX_IMAGE_BYTES:
            raise ValueError(f"{name}: {size} bytes is not an image; prepare the dataset again")
        data = os.pread(self._file(shard), size, offset)
        if zlib.crc32(data) != self._crc32[number]:
            raise ValueError(f"{name}: damaged, its checksum differs; prepare the dataset again")
        return decode_record(data, name, self.image_shape)

    def _file(self, shard: int) -> int:
        """An open file of this process; closes the least recently used one first."""
        if self._process != os.getpid():  # the parent's descriptors are shared with it: reopen
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            path = self._folder / self._names[shard]
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise OSError(f"shard {path} cannot be read: {error.strerror}") from error
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)


def _shape(value: Any) -> tuple[int, int, int]:
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
