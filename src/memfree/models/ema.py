"""Exponential moving average of the weights, as a Lightning callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialMovingAverage(WeightAveraging):
    """Keeps ``average ← decay · average + (1 − decay) · weights`` after every optimizer step.

    Checkpoints hold the average as ``state_dict`` and the weights in training beside it (as
    Lightning's callback has it). Unlike there, the module keeps its own weights when training
    ends, and a step costs a few fused operations instead of one for each parameter.
    """

    def __init__(self, decay: float) -> None:
        """Average with ``decay`` in [0, 1)."""
        super().__init__(use_buffers=False)
        self.decay = decay
        self._update = get_ema_multi_avg_fn(decay)
        # Found once: walking through the modules costs a millisecond.
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the weights, to where they will be trained."""
        self._pairs = None
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Update the average if the optimizer has stepped since."""
        if trainer.global_step > self._latest_update_step:
            if self._pairs is None:
                self._pairs = list(self.average.parameters()), list(pl_module.parameters())
            with torch.no_grad():
                self._update(*self._pairs, 0)
            self._latest_update_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module as it is: the last checkpoint still has to hold both."""

    @property
    def average(self) -> nn.Module:
        """The averaged copy of the Lightning module."""
        assert self._average_model is not None
        return self._average_model.module
