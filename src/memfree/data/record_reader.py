"""Record reader: images of a dataset folder in any order, checked and decoded."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memfree.images import MAX_IMAGE_BYTES, decode_record

_OPEN_SHARDS = 64


class RecordReader:
    """Reads images of a dataset folder in any order, in any process.

    Args:
        folder: where the shards are.
        records: index rows, with ``shard, offset, size, crc32, row``.
        image_shape: (C, H, W) that every image must have.
        cache_bytes: keep decoded images, one for all exact copies of it, if all of them take at
            most so much memory.
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
        self._offset, self._size, self._crc32, self._row = (
            records[name].to_numpy() for name in ("offset", "size", "crc32", "row")
        )
        self._cached: np.ndarray | None = None
        distinct, self._slot = np.unique(self._row, return_inverse=True)
        if 0 < len(distinct) * int(np.prod(image_shape)) <= cache_bytes:
            self._cached = np.empty((len(distinct), *image_shape), np.uint8)
            self._filled = np.zeros(len(distinct), bool)

    def __len__(self) -> int:
        return len(self._row)

    def read(
        self, numbers: Iterable[int], broken: Callable[[int, str], None] | None = None
    ) -> Tensor:
        """Images of these records, (n, C, H, W) uint8.

        Args:
            numbers: positions in the index.
            broken: called with the position and a message for a record that cannot be read, which
                is then left out, instead of raising it.

        Raises:
            ValueError: a record's bytes are not those that were written, or it does not decode.
            OSError: a shard cannot be read.
        """
        if self._cached is not None:
            return self._read_cached(np.fromiter(numbers, np.int64), broken)
        images = []
        for number in numbers:
            try:
                images.append(self._decode(number))
            except (ValueError, OSError) as error:
                if broken is None:
                    raise
                broken(number, str(error))
        if not images:
            return torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return torch.from_numpy(np.stack(images))

    def _read_cached(
        self, numbers: np.ndarray, broken: Callable[[int, str], None] | None
    ) -> Tensor:
        assert self._cached is not None
        slots = self._slot[numbers]
        lost = []
        for position in np.flatnonzero(~self._filled[slots]).tolist():
            try:
                self._cached[slots[position]] = self._decode(int(numbers[position]))
            except (ValueError, OSError) as error:
                if broken is None:
                    raise
                broken(int(numbers[position]), str(error))
                lost.append(position)
                continue
            self._filled[slots[position]] = True
        return torch.from_numpy(self._cached[np.delete(slots, lost) if lost else slots])

    def _decode(self, number: int) -> np.ndarray:
        shard, offset, size = (int(of[number]) for of in (self._shard, self._offset, self._size))
        name = f"{self._folder / self._names[shard]}, record {number}"
        if not 0 < size <= MAX_IMAGE_BYTES:
            raise ValueError(f"{name}: {size} bytes is no image size; prepare the dataset again")
        data = os.pread(self._file(shard), size, offset)
        if zlib.crc32(data) != self._crc32[number]:
            raise ValueError(f"{name}: damaged, its checksum differs; prepare the dataset again")
        return decode_record(data, name, self.image_shape)

    def _file(self, shard: int) -> int:
        """An open file of this process; the one not used for longest is closed first."""
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
