"""Sample writer: a Lightning callback that writes samples and traces shard by shard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset as wds
from lightning.pytorch import Callback, LightningModule, Trainer
from pyarrow import parquet
from torch import Tensor

from memfree.folders.atomic import write_atomic
from memfree.images import to_bytes, to_png
from memfree.sampling.loop import TRACE_COLUMNS
from memfree.sampling.module import SampleBatch
from memfree.sampling.sample_run import SampleRun

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Forget what the process held before; where the system cannot, the peak is of its lifetime."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: VmHWM starts again at what is resident now


def peak_memory(device: torch.device) -> int:
    """Largest memory since the reset: allocated on the GPU, or resident, bytes; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found.group(1))
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class SampleWriter(Callback):
    """Write ``samples-RANK-N.tar`` and ``trace-RANK-N.parquet``, each atomically, trace first.

    The files of a part of the run are named ``samples-PART-RANK-N.tar``.

    A sample's PNG has a JSON beside it: ``index``, ``seed`` (of the run), ``condition`` (label,
    prompt or null), ``mitigation``, ``peak_sigma`` (largest σ_t), ``nearest`` (image key at the
    last step), ``active_steps``, ``seconds`` (its part of the batch) and ``peak_memory_bytes`` (of
    the process or its GPU while sampling).

    Args:
        run: the sample folder.
        seed: seed of the run.
        mitigation: name of the mitigation.
        keys: image keys of the reference index by row; None without an index.
        batches_per_shard: batches collected in a shard; what a killed run has not yet put in a
            shard is drawn again.
    """

    def __init__(
        self,
        run: SampleRun,
        seed: int,
        mitigation: str,
        keys: Sequence[str] | None = None,
        batches_per_shard: int = 1,
    ) -> None:
        self.run = run
        self.seed = seed
        self.mitigation = mitigation
        self.keys = keys
        self.batches_per_shard = batches_per_shard
        self._pending: list[SampleBatch] = []
        self._shard = 0
        self._parent = os.getppid()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue behind the shards that this rank has written before."""
        self._shard = self.run.next_shard(trainer.global_rank)
        self._parent = os.getppid()
        self._pending = []
        reset_peak_memory(pl_module.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the batch; write a shard when enough are together."""
        self._pending.append(outputs)
        if len(self._pending) >= self.batches_per_shard:
            self._flush(trainer, pl_module)
        # Ranks do not talk while they sample: without this, those of a killed run would go on.
        if trainer.global_rank > 0 and os.getppid() != self._parent:
            raise ValueError("the process that started this one has ended; stopping")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last shard."""
        if self._pending:
            self._flush(trainer, pl_module)

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = f"{self.run.writer(trainer.global_rank)}-{self._shard:06d}"
        memory = peak_memory(pl_module.device)
        traces = [
            trace_table(batch.index, batch.trace, self.keys)
            for batch in self._pending
            if batch.trace is not None
        ]
        if traces:
            table = pa.concat_tables(traces)
            write_atomic(
                self.run.folder / f"trace-{name}.parquet",
                lambda path: parquet.write_table(table, path, compression="zstd"),
            )
        records = [self._records(batch, memory) for batch in self._pending]
        images = [to_bytes(batch.images) for batch in self._pending]
        write_atomic(
            self.run.folder / f"samples-{name}.tar",
            lambda path: write_shard(path, sum(records, []), torch.cat(images)),
        )
        self._pending = []
        self._shard += 1

    def _records(self, batch: SampleBatch, memory: int) -> list[dict[str, Any]]:
        count = len(batch.index)
        peaks, nearest, active = summaries(batch, self.keys)
        asked = [None] * count if batch.conditions is None else batch.conditions
        return [
            {
                "index": index,
                "seed": self.seed,
                "condition": asked[row],
                "mitigation": self.mitigation,
                "peak_sigma": peaks[row],
                "nearest": nearest[row],
                "active_steps": active[row],
                "seconds": batch.seconds / count,
                "peak_memory_bytes": memory,
            }
            for row, index in enumerate(batch.index.tolist())
        ]


def write_shard(path: Path, records: list[dict[str, Any]], images: Tensor) -> None:
    """Write samples as a WebDataset tar: ``INDEX.png`` and ``INDEX.json``.

    Args:
        path: file to write.
        records: one JSON object a sample, with ``index``.
        images: (N, C, H, W) uint8.
    """
    with open(path, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
        for record, image in zip(records, images, strict=True):
            tar.write(
                {
                    "__key__": f"{record['index']:08d}",
                    "png": to_png(image),
                    "json": json.dumps(record, allow_nan=False).encode(),
                }
            )


def trace_table(index: Tensor, trace: dict[str, Tensor], keys: Sequence[str] | None) -> pa.Table:
    """The trace of a batch as on disk: sample indices for batch rows, image keys for index rows.

    Args:
        index: sample indices of the batch, (B,).
        trace: columns of ``sample``'s trace, (B·steps,) each; ``sample`` counts within the batch.
        keys: image keys by row of the reference index; None leaves ``nearest`` null.
    """
    columns: dict[str, Any] = {}
    known = ["sample", "step", "t", *TRACE_COLUMNS]
    for name in [*known, *sorted(trace.keys() - set(known))]:
        if name == "sample":
            columns[name] = index[trace["sample"]].numpy()
        elif name == "nearest":
            columns[name] = _key_column(trace.get("nearest"), keys, len(trace["sample"]))
        elif name in trace:  # NaN, what no guidance recorded, becomes null
            columns[name] = pa.array(trace[name].numpy(), from_pandas=True)
    return pa.table(columns)


def _key_column(rows: Tensor | None, keys: Sequence[str] | None, length: int) -> pa.Array:
    if rows is None or keys is None:
        return pa.nulls(length, pa.string())
    return pa.array([keys[row] if row >= 0 else None for row in rows.tolist()], pa.string())


def summaries(
    batch: SampleBatch, keys: Sequence[str] | None
) -> tuple[list[float | None], list[str | None], list[int]]:
    """Of each sample: largest σ_t, key of the nearest image at the last step, active steps."""
    count = len(batch.index)
    peaks: list[float | None] = [None] * count
    nearest: list[str | None] = [None] * count
    active = [0] * count
    if batch.trace is None:
        return peaks, nearest, active
    sample = batch.trace["sample"].numpy()
    for row in range(count):
        here = np.flatnonzero(sample == row)
        if "sigma" in batch.trace:
            sigma = batch.trace["sigma"].numpy()[here]
            sigma = sigma[np.isfinite(sigma)]
            peaks[row] = float(sigma.max()) if len(sigma) else None
        if "nearest" in batch.trace and keys is not None:
            last = here[np.argmax(batch.trace["step"].numpy()[here])]
            number = int(batch.trace["nearest"][last])
            nearest[row] = keys[number] if number >= 0 else None
        if "active" in batch.trace:
            active[row] = int(batch.trace["active"].numpy()[here].astype(bool).sum())
    assert all(peak is None or math.isfinite(peak) for peak in peaks)
    return peaks, nearest, active
