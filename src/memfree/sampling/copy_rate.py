"""CopyRate: the share of copies among a few samples at each validation of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from memfree.guidance.calibration import Judge, calibration_of, default_similarity
from memfree.models.module import DiffusionModule

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class CopyRate(pl.Callback):
    """Logs ``val/copy_rate``: the share of ``count`` samples that an index calls copies.

    The samples are those of ``DiffusionModule.preview``: DDIM from the same noise each time, with
    averaged weights if there are any. Rank 0 draws them.

    Args:
        index: references of the images that the module makes, calibrated for this rate.
        count: samples, 1 or more; rates below 1/count cannot be resolved.
        false_positive_rate: share of real images that would be called copies, in (0, 1).
    """

    def __init__(
        self,
        index: ReferenceIndex,
        count: int = 64,
        false_positive_rate: float = 0.01,
        steps: int = 25,
        seed: int = 0,
    ) -> None:
        self.count, self.steps, self.seed = count, steps, seed
        similarity = default_similarity(index)
        calibration = calibration_of(index, similarity)
        calibration.threshold(false_positive_rate)  # refuses a rate that is too small
        self.judge = Judge(index, similarity, calibration, false_positive_rate)
        self._rate = 0.0

    @torch.no_grad()
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and judge the samples before validation swaps in the averaged weights."""
        assert isinstance(pl_module, DiffusionModule)
        if trainer.is_global_zero:
            averaged = pl_module.average or pl_module
            images = averaged.preview(self.count, self.steps, self.seed).float()
            self.judge.index.to(images.device)
            *_, copies = self.judge(images, batch_size=self.count)
            self._rate = float(copies.float().mean())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rate beside the loss, on all ranks: a callback may watch it."""
        rate = trainer.strategy.broadcast(self._rate)
        pl_module.log("val/copy_rate", rate, batch_size=self.count)
