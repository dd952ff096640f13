"""Distinct images of some parts of a dataset folder, each as likely as any other, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from memfree.data.folder import DatasetFolder, to_float
from memfree.data.reader import RecordReader
from memfree.data.split import PartName


class DistinctImages(Dataset[dict[str, Any]]):
    """Every distinct image of some parts once, however often the training set repeats it.

    Args:
        folder: the dataset folder.
        parts: which parts; an empty one is left out.
        cache_bytes: keep decoded images in memory if all of them take at most so many bytes.

    Attributes:
        captions: caption of each image, that of its original record, not one that a duplication
            plan gave to a copy; None without captions.
        groups: (N,) int64 number of each image's group.

    Raises:
        ValueError: all of the parts are empty.
    """

    def __init__(
        self, folder: DatasetFolder, parts: Sequence[PartName], cache_bytes: int = 1 << 30
    ) -> None:
        records = pa.concat_tables([folder.part_records(part) for part in parts])
        if len(records) == 0:
            raise ValueError(f"{folder.path} has no images in {', '.join(parts)}; prepare it again")
        records = records.take(originals(records))
        self._reader = RecordReader(folder.path, records, folder.image_shape, cache_bytes)
        captions = records["caption"]
        self.captions: list[str] | None = captions.to_pylist() if captions.null_count == 0 else None
        names = folder.items["group"].take(records["row"]).to_pylist()
        self.groups = torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, numbers: list[int]) -> dict[str, Any]:
        """A batch: ``image`` (B, C, H, W) in [-1, 1], ``group`` and ``row`` (B,), ``caption``."""
        batch: dict[str, Any] = {
            "image": to_float(self._reader.read(numbers)),
            "group": self.groups[numbers],
            "row": torch.tensor(numbers),
        }
        if self.captions is not None:
            batch["caption"] = [self.captions[number] for number in numbers]
        return batch

    def images(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [-1, 1]."""
        return to_float(self._reader.read(range(len(self))))

    def loader(self, batch_size: int, steps: int, seed: int) -> DataLoader[Any]:
        """``steps`` batches; each pass through the images is another permutation by ``seed``.

        Raises:
            ValueError: a batch would have more images than there are.
        """
        if batch_size > len(self):
            raise ValueError(
                f"--batch_size {batch_size}: there are only {len(self)} images; use fewer"
            )
        return DataLoader(
            self, batch_size=None, sampler=_Permutations(len(self), batch_size, steps, seed)
        )


def originals(records: pa.Table) -> np.ndarray:
    """Positions of one record a row: that of its lowest copy number, in the order of rows."""
    row, copy = (records[name].to_numpy() for name in ("row", "copy"))
    order = np.lexsort((copy, row))
    return order[np.unique(row[order], return_index=True)[1]]


class _Permutations(Sampler[list[int]]):
    """Batches of numbers; what is left of a permutation is dropped, so that none repeats."""

    def __init__(self, count: int, batch_size: int, steps: int, seed: int) -> None:
        self._count, self._batch_size, self._steps, self._seed = count, batch_size, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.Generator(np.random.PCG64([self._seed, 0]))
        done = 0
        while done < self._steps:
            order = generator.permutation(self._count)
            for start in range(0, self._count - self._batch_size + 1, self._batch_size):
                if done == self._steps:
                    return
                yield order[start : start + self._batch_size].tolist()
                done += 1
