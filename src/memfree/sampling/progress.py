"""Progress bar of sampling: samples a second, share of guided samples."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress, TextColumn

from memfree.console import counting_bar, plain_console
from memfree.sampling.module import SampleBatch, SampleIndices

PLAIN_INTERVAL = 10.0
"""Seconds between two lines where the output is no terminal."""


class SampleProgress(Callback):
    """A progress bar in a terminal, now and then a line elsewhere.

    Rank 0 counts its own samples; with several ranks, whose ranges are equally long, the line says
    so and the rate is of all ranks together.

    Args:
        steered: whether AMG may act, so that its share is worth telling.
        console: where to write; standard error by default, so that results can be piped.
    """

    def __init__(self, steered: bool = True, console: Console | None = None) -> None:
        self.steered = steered
        self.console = console or plain_console(stderr=True)
        self._bar: Progress | None = None
        self._total = self._done = self._active = self._ranks = 0
        self._start = self._last = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count this rank's samples and open the bar."""
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SampleIndices)
        self._total = len(data.mine())
        self._ranks = trainer.world_size
        self._start = self._last = time.monotonic()
        if self.console.is_terminal:
            self._bar = counting_bar(self.console, TextColumn("{task.fields[text]}"))
            self._bar.add_task("sampling", total=self._total, text="")
            self._bar.start()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        if not trainer.is_global_zero:
            return
        self._done += len(outputs.index)
        self._active += active_samples(outputs)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, text=self.text())
        elif time.monotonic() - self._last >= PLAIN_INTERVAL or self._done == self._total:
            self._last = time.monotonic()
            self.console.print(f"{self._done} of {self._total} samples, {self.text()}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def text(self) -> str:
        """Rate and share of active samples so far."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        text = f"{self._ranks * self._done / elapsed:.1f} samples/s"
        if self.steered:
            text += f", {self._active / max(self._done, 1):.0%} steered by AMG"
        return text if self._ranks == 1 else f"{text} (rank 0 of {self._ranks})"


def active_samples(batch: SampleBatch) -> int:
    """How many samples of the batch AMG has steered at one step or more."""
    if batch.trace is None or "active" not in batch.trace:
        return 0
    return len(batch.trace["sample"][batch.trace["active"].bool()].unique())
