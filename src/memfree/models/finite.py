"""Stops a training whose loss or weights are no longer finite, before that is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """Training came to a loss or to weights that are NaN or infinite; raised by all ranks."""


class FiniteTraining(pl.Callback):
    """Raises NotFiniteError on all ranks together once a loss was NaN or infinite.

    Looking at a loss waits for the device, and agreeing costs a message between ranks, so both
    happen every ``every_n_steps`` only; a single process on a CPU looks at every step. Before a
    checkpoint the losses so far and the weights are looked at in any case.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """Look every ``every_n_steps`` optimizer steps."""
        self.every_n_steps = every_n_steps
        self._bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Remember whether this step's loss was finite."""
        bad = ~torch.isfinite(outputs["loss"].detach())
        self._bad = bad if self._bad is None else self._bad | bad
        cheap = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if cheap or trainer.global_step % self.every_n_steps == 0:
            self._raise_if_bad(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite."""
        for parameter in pl_module.parameters():
            bad = ~torch.isfinite(parameter.detach()).all()
            self._bad = bad if self._bad is None else self._bad | bad
        self._raise_if_bad(trainer)

    def _raise_if_bad(self, trainer: pl.Trainer) -> None:
        ok = self._bad is None or not bool(self._bad)
        if not trainer.strategy.reduce_boolean_decision(ok, all=True):
            raise NotFiniteError(
                f"the loss or the weights became NaN or infinite by step {trainer.global_step}; "
                f"{_kept(trainer)}; lower --model.learning_rate, or check the images"
            )


def _kept(trainer: pl.Trainer) -> str:
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return f"{Path(path)} is the last good checkpoint" if path else "no checkpoint was saved yet"
