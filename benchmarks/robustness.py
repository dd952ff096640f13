"""What safety costs: exact resume, atomic writes, locks; and the stream on one and two ranks.

``python benchmarks/robustness.py`` writes benchmarks/results/robustness.json.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from harness import Records, compared, interleaved, measure, record
from stream import BATCH, colour_folder

from memfree.commands.prepare import prepare
from memfree.data import ShardDataModule
from memfree.folders.atomic import write_atomic
from memfree.folders.lock import one_writer

STATE_LIMIT = 1000
"""Goal: bytes of the data module's state in a checkpoint, at most."""


def resume(data: Path, repetitions: int) -> Records:
    """Seconds to the next batch from the middle of an epoch, over seconds to its first batch."""
    module = ShardDataModule(str(data), batch_size=BATCH, cache_bytes=0)
    stream = module.dataset()

    def next_batch(number: int) -> Callable[[], object]:
        return lambda: stream.batch(0, number)

    middle = stream.batches // 2
    timings = interleaved({"middle": next_batch(middle), "first": next_batch(0)}, repetitions)
    path = data.parent / "state.pt"
    torch.save(module.state_dict(), path)
    return [
        compared(
            f"next batch after resuming at batch {middle} of {stream.batches} / first batch",
            timings,
            "middle",
            "first",
        ),
        record(
            "state of the data module in a checkpoint / goal",
            path.stat().st_size,
            STATE_LIMIT,
            "bytes",
        ),
    ]


def writes(folder: Path, repetitions: int) -> Records:
    """Atomic, flushed writes over plain ones, and a lock taken and given back."""
    made = []
    for size, name in ((10_000, "10 kB"), (10_000_000, "10 MB")):
        content = os.urandom(size)
        plain, atomic = folder / "plain", folder / "atomic"
        timings = interleaved(
            {
                "atomic": lambda path=atomic, data=content: write_atomic(
                    path, lambda temporary: temporary.write_bytes(data)
                ),
                "plain": lambda path=plain, data=content: path.write_bytes(data),
            },
            repetitions,
        )
        made.append(compared(f"atomic write of {name} / plain write", timings, "atomic", "plain"))

    def locked() -> None:
        with one_writer(folder / "out"):
            pass

    def plain_file() -> None:
        (folder / "file").write_text("{}")
        (folder / "file").unlink()

    timings = interleaved({"lock": locked, "file": plain_file}, repetitions)
    made.append(
        compared("lock taken and given back / a file made and removed", timings, "lock", "file")
    )
    return made


def _epoch(data: str, rank: int, ranks: int, ours: bool, ready: Any, results: Any) -> None:
    """One rank's part of an epoch, begun by all ranks together; its records and seconds."""
    torch.set_num_threads(1)
    if ours:
        stream = ShardDataModule(data, batch_size=BATCH, cache_bytes=0).dataset(rank, ranks)
        batches = (len(batch["image"]) for batch in stream)
    else:
        shards = [str(path) for path in sorted(Path(data).glob("train-*.tar"))][rank::ranks]
        bare = wds.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
        batches = (len(batch[0]) for batch in bare.batched(BATCH))
    ready.wait()
    start = time.perf_counter()
    count = sum(batches)
    results.put((count, time.perf_counter() - start))


def speed(data: Path, ranks: int, ours: bool) -> float:
    """Records a second of all ranks together, each a process."""
    context = get_context("spawn")
    ready, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=_epoch, args=(str(data), rank, ranks, ours, ready, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    parts = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(count for count, _ in parts) / max(seconds for _, seconds in parts)


def ranks_stream(data: Path, ranks: int, repetitions: int) -> dict[str, Any]:
    """Our stream over bare webdataset decoding of the same shards, on so many ranks."""
    pairs = [(speed(data, ranks, True), speed(data, ranks, False)) for _ in range(repetitions)]
    ours, bare = (float(np.median(values)) for values in zip(*pairs, strict=True))
    return record(
        f"stream of 32 x 32 colour PNGs on {ranks} rank(s) / webdataset decoding",
        ours,
        bare,
        "records/s",
        float(np.median([own / other for own, other in pairs])),
        repetitions=repetitions,
    )


def run(tiny: bool = False) -> Records:
    """Measure; one record a figure (see ``harness.record``)."""
    count, repetitions, epochs = (300, 2, 1) if tiny else (2000, 9, 3)
    # Each rank is a process, which takes seconds to start.
    ranks_compared = (1,) if tiny else (1, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = colour_folder(folder / "pngs", count)
        data = folder / "colour"
        prepare(data, source="folder", path=str(source), near_distance=0, records_per_shard=100)
        streams = [ranks_stream(data, ranks, epochs) for ranks in ranks_compared]
        return [*resume(data, repetitions), *writes(folder, repetitions), *streams]


if __name__ == "__main__":
    torch.manual_seed(0)
    measure("robustness", run)
