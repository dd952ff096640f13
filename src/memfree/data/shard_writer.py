"""Shard writer: records to WebDataset tars whose bytes depend on their content alone."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from memfree.data.split import PartName
from memfree.folders.manifest import sha256
from memfree.images import pixels_to_png

_TEXT, _NUMBER = pa.string(), pa.int64()
ITEMS_SCHEMA = pa.schema({"image_key": _TEXT, "group": _TEXT, "copies": _NUMBER, "part": _TEXT})
"""Columns of ``items.parquet``, the distinct images."""
CONDITIONS_SCHEMA = pa.schema(
    {"image_key": _TEXT, "label": _NUMBER, "caption": _TEXT, "count": _NUMBER, "part": _TEXT}
)
"""Columns of ``conditions.parquet``: record counts of each image and condition."""
RECORDS_SCHEMA = pa.schema(
    {
        "part": _TEXT,
        "record": _NUMBER,  # number in the part
        "row": _NUMBER,  # of items.parquet
        "copy": pa.int32(),  # 0: the original
        "label": _NUMBER,
        "caption": _TEXT,
        "shard": _TEXT,
        "offset": _NUMBER,  # of the image's bytes in the shard
        "size": _NUMBER,
        "crc32": pa.uint32(),
    }
)
"""Columns of ``records.parquet``, the index for reading records in any order."""


@dataclass(frozen=True)
class Record:
    """One record to write."""

    row: int
    copy: int
    """0 for the image itself, 1, 2, ... for its copies."""
    label: int | None
    caption: str | None


@dataclass
class WrittenShard:
    """One shard, as the manifest describes it."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclass
class ShardWriter:
    """Writes records part by part and collects their index."""

    folder: Path
    records_per_shard: int
    shards: list[WrittenShard] = field(default_factory=list)
    index: list[tuple[Any, ...]] = field(default_factory=list)
    _part: PartName | None = None
    _count: int = 0
    _file: BinaryIO | None = None

    def write(
        self, part: PartName, record: Record, pixels: np.ndarray, image_key: str, group: str
    ) -> None:
        """Append one record; the first of another part begins a new shard."""
        if part != self._part:
            self.close()
            self._part, self._count = part, 0
        if self._file is None:
            self._path = self.folder / f"{part}-{self._count // self.records_per_shard:06d}.tar"
            self._file = open(self._path, "xb")  # noqa: SIM115 - closed by close()
            self._tar = tarfile.open(  # noqa: SIM115
                fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT
            )
        key = f"{part}{self._count:08d}"
        image = pixels_to_png(pixels)
        meta = {
            "image_key": image_key,
            "group": group,
            "copy": record.copy,
            "caption": record.caption,
            "label": record.label,
        }
        offset = self._file.tell() + tarfile.BLOCKSIZE  # behind the member's header
        self._add(f"{key}.png", image)
        self._add(f"{key}.json", json.dumps(meta, sort_keys=True).encode())
        if record.caption is not None:
            self._add(f"{key}.txt", record.caption.encode())
        if record.label is not None:
            self._add(f"{key}.cls", str(record.label).encode())
        row = (part, self._count, record.row, record.copy, record.label, record.caption)
        place = (self._path.name, offset, len(image), zlib.crc32(image))
        self.index.append(row + place)
        self._count += 1
        if self._count % self.records_per_shard == 0:
            self.close()

    def _add(self, name: str, data: bytes) -> None:
        """Append a member without times, owners or anything else that varies between runs."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Finish the open shard and flush it to disk."""
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        records = (self._count - 1) % self.records_per_shard + 1
        size, digest = self._path.stat().st_size, sha256(self._path)
        self.shards.append(WrittenShard(self._path.name, records, size, digest))


def record_bytes(pixels: int) -> int:
    """Largest size in a shard of a record with N pixel values."""
    return pixels + 8 * tarfile.BLOCKSIZE
