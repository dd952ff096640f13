"""Whether a stopped epoch can go on: only with the very batches that it began with."""

from __future__ import annotations

from typing import Any

from memfree.data.wording import counted


def epoch_order(
    batches: int, global_batch_size: int, ranks: int, workers: int | None
) -> dict[str, Any]:
    """What the batches of an epoch depend on, beside the records and the seed, as JSON values.

    Args:
        batches: of an epoch on each rank.
        global_batch_size: records of a batch on all ranks, at most.
        ranks: number of processes.
        workers: processes that read for each of them, where these deal the shards out among
            themselves; None where batches do not depend on who reads.
    """
    readers = None if workers is None else {"ranks": ranks, "workers": max(workers, 1)}
    return {"batches": batches, "global_batch_size": global_batch_size, "readers": readers}


def go_on(progress: dict[str, int], stopped: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run may go on from a checkpoint, and begin an epoch anew where one had ended.

    Args:
        progress: Lightning's counts of the batches of the present epoch, from the checkpoint.
            Where that stopped at the end of an epoch, they are set to those of an epoch with as
            many batches as one has now: Lightning would go on behind the batches of the old one.
        stopped: ``epoch_order`` of the run that was stopped.
        now: ``epoch_order`` of the run that goes on.

    Raises:
        ValueError: it was stopped within an epoch and other batches would follow.
    """
    trained = progress["ready"]
    if trained >= stopped["batches"]:
        for name in progress:
            progress[name] += now["batches"] - trained
        return
    if stopped["readers"] != now["readers"]:
        raise ValueError(
            f"the checkpoint stopped within an epoch that {_readers(stopped)} read, now "
            f"{_readers(now)} would: shards without a manifest go on with the same "
            "--trainer.devices and --data.num_workers only"
        )
    if stopped["batches"] != now["batches"]:
        raise ValueError(
            f"the checkpoint stopped within an epoch of {_batches(stopped)}, now it would have "
            f"{_batches(now)}; give the --data.batch_size and --trainer.devices of before, or "
            "others that make as many batches"
        )


def _batches(order: dict[str, Any]) -> str:
    batches = "1 batch" if order["batches"] == 1 else f"{order['batches']} batches"
    return f"{batches} of at most {counted(order['global_batch_size'], 'record')}"


def _readers(order: dict[str, Any]) -> str:
    readers = order["readers"] or {"ranks": 1, "workers": 1}
    return f"{counted(readers['ranks'], 'rank')} with {counted(readers['workers'], 'worker')} each"
