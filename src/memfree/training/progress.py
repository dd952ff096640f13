"""Progress bar of training, with the loss."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memfree.console import plain_console

PLAIN_INTERVAL = 10.0
"""Seconds between two lines where the output is no terminal."""


class StepProgress(ProgressBar):
    """One bar over all optimizer steps, with the loss; now and then a line where no terminal is.

    Lightning's own bars start again with each epoch, which on a small dataset is every second.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Write to ``console``; standard error by default."""
        super().__init__()
        self.console = console or plain_console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None
        self._total: float | None = None
        self._last_line = 0.0

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, which starts at the step that training resumes from."""
        total = float(trainer.estimated_stepping_batches)
        self._total = total if math.isfinite(total) else None
        self._last_line = time.monotonic()
        if not (self._enabled and self.console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            # Each refresh takes the interpreter from the training step.
            refresh_per_second=2,
        )
        self._bar.add_task("", total=self._total, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Move the bar."""
        if not self._enabled or trainer.global_step % 10:
            return
        loss = trainer.callback_metrics.get("loss")
        text = "" if loss is None else f"loss {float(loss):.4f}"
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=trainer.global_step, description=text)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            total = "" if self._total is None else f" of {self._total:.0f}"
            parts = [f"step {trainer.global_step}{total}", *([text] if text else [])]
            self.console.print(", ".join(parts))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        self.console.print(*args, **kwargs)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
