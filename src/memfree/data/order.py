"""The order of an epoch, and which records of it make which batch on which rank."""

from __future__ import annotations

import numpy as np

from memfree.data.wording import counted


def permutation(records: int, seed: int, epoch: int) -> np.ndarray:
    """Order of all records in one epoch; ranks, workers and batch size play no part.

    Args:
        records: how many there are.
        seed: of the training run.
        epoch: from 0.

    Returns:
        (records,) int64.
    """
    return np.random.Generator(np.random.PCG64([seed, epoch, 7])).permutation(records)


def batches_per_epoch(records: int, batch_size: int, world_size: int) -> int:
    """Batches that every rank gets in an epoch.

    Batches are of nearly equal size and at most ``batch_size``; only with ``batch_size`` 1 on
    several ranks some may hold two, since no rank may be left without a record.

    Raises:
        ValueError: fewer records than ranks.
    """
    if batch_size < 1:
        raise ValueError(f"--data.batch_size {batch_size}: use 1 or more")
    if records < world_size:
        raise ValueError(
            f"{counted(records, 'training record')} cannot feed {world_size} ranks; "
            "use fewer devices"
        )
    return min(-(-records // (batch_size * world_size)), records // world_size)


def global_slice(records: int, batches: int, batch: int) -> tuple[int, int]:
    """Positions [start, end) in the epoch's order that global batch number ``batch`` takes."""
    return batch * records // batches, (batch + 1) * records // batches


def rank_slice(start: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions [start, end) of one rank within a global batch."""
    count = end - start
    return start + rank * count // world_size, start + (rank + 1) * count // world_size
