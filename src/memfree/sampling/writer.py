"""Lightning callbacks for sampling: a writer of samples and traces, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset as wds
from lightning.pytorch import Callback, LightningModule, Trainer
from pyarrow import parquet
from rich.console import Console
from torch import Tensor

from memfree.console import ProgressLine, plain_console
from memfree.folders.atomic import write_atomic
from memfree.images import to_bytes, to_png
from memfree.sampling.loop import TRACE_COLUMNS
from memfree.sampling.module import SampleBatch, SampleIndices
from memfree.sampling.sample_run import SampleRun

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Reset the memory peak; where the system cannot, it covers the process's lifetime."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: VmHWM starts again at what is resident now


def peak_memory(device: torch.device) -> int:
    """Peak memory since the reset in bytes: allocated on the GPU, or resident; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        if line := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return 1024 * int(line[1])
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return 0


@dataclass(eq=False)
class SampleWriter(Callback):
    """Writes ``samples-RANK-N.tar`` and ``trace-RANK-N.parquet``, each atomically, trace first.

    Names of a part of the run are ``samples-PART-RANK-N.tar``. Each PNG has a JSON beside it:
    ``index``, ``seed`` (of the run), ``condition`` (label, prompt or null), ``mitigation``,
    ``peak_sigma`` (largest σ_t), ``nearest`` (image key at the last step), ``active_steps``,
    ``seconds`` (share of the batch's) and ``peak_memory_bytes`` (of the process or its GPU).
    """

    run: SampleRun
    seed: int
    mitigation: str
    keys: Sequence[str] | None = None  # of the reference index by row
    batches_per_shard: int = 1

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue after this rank's existing shards."""
        self._shard = self.run.next_shard(trainer.global_rank)
        self._parent = os.getppid()
        self._pending: list[SampleBatch] = []
        reset_peak_memory(pl_module.device)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Collect the batch; write a full shard."""
        self._pending.append(outputs)
        if len(self._pending) >= self.batches_per_shard:
            self._flush(trainer, pl_module)
        # Ranks do not communicate while sampling: those of a killed run would continue.
        if trainer.global_rank > 0 and os.getppid() != self._parent:
            raise ValueError("the process that started this one has ended; stopping")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last shard."""
        if self._pending:
            self._flush(trainer, pl_module)

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = f"{self.run.writer(trainer.global_rank)}-{self._shard:06d}"
        memory = peak_memory(pl_module.device)
        pending = [batch for batch in self._pending if batch.trace is not None]
        if pending:
            traces = [trace_table(batch.index, batch.trace or {}, self.keys) for batch in pending]
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
        conditions = batch.conditions or [None] * count
        return [
            {
                "index": index,
                "seed": self.seed,
                "condition": conditions[row],
                "mitigation": self.mitigation,
                "peak_sigma": peaks[row],
                "nearest": nearest[row],
                "active_steps": active[row],
                "seconds": batch.seconds / count,
                "peak_memory_bytes": memory,
            }
            for row, index in enumerate(batch.index.tolist())
        ]


class SampleProgress(Callback):
    """Samples per second of all ranks and, if ``steered``, AMG's share; on stderr by default."""

    def __init__(self, steered: bool = True, console: Console | None = None) -> None:
        self.steered = steered
        self.console = console or plain_console(stderr=True)
        self._line: ProgressLine | None = None
        self._total = self._done = self._active = 0
        self._ranks = 1
        self._start = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count this rank's samples and open the bar."""
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(data, SampleIndices)
            self._total, self._ranks = len(data.mine()), trainer.world_size
            self._start = time.monotonic()
            self._line = ProgressLine(self.console, "sampling", "{} of {} samples", self._total)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Count the batch."""
        if self._line is not None:
            self._done += len(outputs.index)
            self._active += active_samples(outputs)
            self._line.show(self._done, self.text(), now=self._done == self._total)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Close the bar, so that further output starts on a new line."""
        if self._line is not None:
            self._line.close()

    on_predict_end = on_exception

    def text(self) -> str:
        """Rate and share of active samples so far."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        text = f"{self._ranks * self._done / elapsed:.1f} samples/s"
        if self.steered:
            text += f", {self._active / max(self._done, 1):.0%} steered by AMG"
        return text if self._ranks == 1 else f"{text} (rank 0 of {self._ranks})"


def active_samples(batch: SampleBatch) -> int:
    """Number of samples in the batch that AMG steered at one step or more."""
    if batch.trace is None or "active" not in batch.trace:
        return 0
    return len(batch.trace["sample"][batch.trace["active"].bool()].unique())


def write_shard(path: Path, records: list[dict[str, Any]], images: Tensor) -> None:
    """Write samples (N, C, H, W) uint8 and JSON records as ``INDEX.png`` and ``INDEX.json``."""
    with open(path, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
        for record, image in zip(records, images, strict=True):
            key, text = f"{record['index']:08d}", json.dumps(record, allow_nan=False)
            tar.write({"__key__": key, "png": to_png(image), "json": text.encode()})


def trace_table(index: Tensor, trace: dict[str, Tensor], keys: Sequence[str] | None) -> pa.Table:
    """A batch's trace as on disk, with sample indices, and image keys (null without ``keys``)."""
    columns: dict[str, Any] = {}
    known = ["sample", "step", "t", *TRACE_COLUMNS]
    for name in [*known, *sorted(trace.keys() - set(known))]:
        if name == "sample":
            columns[name] = index[trace["sample"]].numpy()
        elif name == "nearest":
            rows: Any = [-1] * len(trace["sample"])
            if keys is not None and "nearest" in trace:
                rows = trace["nearest"].tolist()
            nearest = [keys[row] if keys is not None and row >= 0 else None for row in rows]
            columns[name] = pa.array(nearest, pa.string())
        elif name in trace:  # NaN (not recorded) becomes null
            columns[name] = pa.array(trace[name].numpy(), from_pandas=True)
    return pa.table(columns)


def summaries(
    batch: SampleBatch, keys: Sequence[str] | None
) -> tuple[list[float | None], list[str | None], list[int]]:
    """For each sample: largest σ_t, key of the nearest image at the last step, active steps."""
    count = len(batch.index)
    trace = {"sigma": torch.tensor([float("nan")] * count), "nearest": torch.tensor([-1] * count)}
    trace |= {"active": torch.zeros(count), **(batch.trace or {})}
    sigma, nearest, active = (  # a trace has its rows step by step
        trace[name].numpy().reshape(-1, count) for name in ("sigma", "nearest", "active")
    )
    peaks = np.where(np.isfinite(sigma), sigma, -np.inf).max(axis=0)
    return (
        [float(peak) if np.isfinite(peak) else None for peak in peaks],
        [keys[row] if keys is not None and row >= 0 else None for row in nearest[-1]],
        active.astype(bool).sum(axis=0).tolist(),
    )
