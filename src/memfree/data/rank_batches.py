"""What all training batches have in common: equal numbers on all ranks, and a place in an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset

from memfree.data.options import OnError
from memfree.data.order import batches_per_epoch

Batch = dict[str, Any]


class RankBatches(IterableDataset[Batch]):
    """Batches of one rank, for one epoch after another.

    Set :attr:`epoch` and :attr:`start` before each iteration. They live in shared memory, so
    workers that stay between epochs see them.

    Args:
        records: of an epoch, all ranks together.
        batch_size: largest number of records of a batch on this rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        random_flip: mirror each record with probability 1/2.
        on_error: stop at what is broken, or leave it out; then each batch carries, as
            ``skipped``, a :class:`memfree.data.skipped.Skipped` of what was left out for it.
    """

    def __init__(
        self,
        records: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        random_flip: bool,
        on_error: OnError,
    ) -> None:
        self.records = records
        self.batches = batches_per_epoch(records, batch_size, world_size)
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._random_flip, self._on_error = random_flip, on_error
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Which order of the records, from 0."""
        return int(self._position[0])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._position[0] = value

    @property
    def start(self) -> int:
        """Batches of the epoch that were trained on already."""
        return int(self._position[1])

    @start.setter
    def start(self, value: int) -> None:
        self._position[1] = value

    def __len__(self) -> int:
        return self.batches
