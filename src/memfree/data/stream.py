"""Training batches from a dataset folder: one order an epoch, equal numbers on all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info

from memfree.data.folder import DatasetFolder, to_float
from memfree.data.options import OnError
from memfree.data.order import global_slice, permutation, rank_slice
from memfree.data.rank_batches import Batch, RankBatches
from memfree.data.reader import RecordReader
from memfree.data.skipped import Skipped


class EpochBatches(RankBatches):
    """Batches of one rank, whole and in order, for one epoch after another.

    Worker w of W makes every W-th batch, and a DataLoader hands them out in turn, so workers
    change nothing.

    Args:
        folder: the dataset.
        batch_size: largest number of records of a batch on this rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        cache_bytes: keep decoded images in memory if all take at most so much.
        random_flip: mirror each record with probability 1/2, by (seed, epoch, record).
        on_error: stop at a broken record, or leave it out.
    """

    def __init__(
        self,
        folder: DatasetFolder,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_bytes: int = 0,
        random_flip: bool = False,
        on_error: OnError = "stop",
    ) -> None:
        records = folder.part_records("train")
        super().__init__(len(records), batch_size, seed, rank, world_size, random_flip, on_error)
        self._reader = RecordReader(folder.path, records, folder.image_shape, cache_bytes)
        self._rows = torch.from_numpy(records["row"].to_numpy().copy())
        self._keys: list[str] = folder.items["image_key"].to_pylist()
        self._labels: torch.Tensor | None = None
        if folder.num_classes is not None:
            self._labels = torch.from_numpy(records["label"].to_numpy().copy())
        captions = records["caption"]
        self._captions = captions.combine_chunks() if captions.null_count == 0 else None

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, start = self.epoch, self.start
        order = permutation(self.records, self._seed, epoch)
        flips = None
        if self._random_flip:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch, 8]))
            flips = torch.from_numpy(generator.random(self.records) < 0.5)
        for batch in range(start + offset, self.batches, step):
            first, last = global_slice(self.records, self.batches, batch)
            mine = rank_slice(first, last, self._rank, self._world_size)
            yield self._batch(order, mine, last - first, flips)

    def _batch(
        self,
        order: np.ndarray,
        mine: tuple[int, int],
        total: int,
        flips: torch.Tensor | None,
    ) -> Batch:
        lost: list[int] = []
        skipped = Skipped()

        def broken(number: int, message: str) -> None:
            lost.append(number)
            skipped.record(message)

        numbers = order[mine[0] : mine[1]]
        skip = self._on_error == "skip"
        pixels = self._reader.read(numbers.tolist(), broken if skip else None)
        weight = len(numbers) * self._world_size / total
        if lost:
            numbers = numbers[~np.isin(numbers, lost)]
        skipped.kept = len(numbers)
        if len(numbers) == 0:  # other ranks wait for this one: fill in a record without weight
            numbers, pixels = self._readable(order, mine[1])
            weight = 0.0
        images = to_float(pixels)
        index = torch.from_numpy(numbers)
        if flips is not None:
            images = torch.where(flips[index][:, None, None, None], images.flip(-1), images)
        rows = self._rows[index]
        batch: Batch = {
            "image": images,
            "key": [self._keys[row] for row in rows.tolist()],
            "row": rows,
            "weight": weight,
        }
        if self._labels is not None:
            batch["label"] = self._labels[index]
        if self._captions is not None:
            batch["caption"] = self._captions.take(numbers).to_pylist()
        if skip:
            batch["skipped"] = skipped
        return batch

    def _readable(self, order: np.ndarray, position: int) -> tuple[np.ndarray, torch.Tensor]:
        """The first record from ``position`` on, around the end, that can be read."""
        for number in np.roll(order, -position):
            pixels = self._reader.read([int(number)], lambda number, message: None)
            if len(pixels):
                return np.array([number]), pixels
        raise ValueError("no training record can be read; prepare the dataset again")
