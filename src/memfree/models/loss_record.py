"""Records the loss of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from memfree.models.loss_log import LossLog


class LossRecord(pl.Callback):
    """Logs ``loss``, the mean since the last record, and ``learning_rate``.

    Lightning's ``log`` at every step would cost more than the rest of our bookkeeping. Records go
    to the loggers directly: Lightning would pass them on only after a checkpoint of that step.

    Attributes:
        epoch: number of the epoch of the last batch, through all resumed runs. Lightning's own
            count after training depends on whether there was anything left to train.
    """

    def __init__(self, every_n_steps: int) -> None:
        """Log every ``every_n_steps`` optimizer steps, as the trainer does."""
        self.every_n_steps = every_n_steps
        self._sum: Tensor | None = None
        self._batches = 0
        self._last_step = -1
        self._recorded: Tensor | None = None
        self.epoch = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the log of the run that is resumed, if this is one."""
        if self._sum is not None:
            self._sum = self._sum.to(pl_module.device)
        for logger in trainer.loggers:
            if isinstance(logger, LossLog):
                logger.keep_before(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last record, and that record."""
        return {
            "sum": self._sum,
            "batches": self._batches,
            "last_step": self._last_step,
            "recorded": self._recorded,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on adding up; all ranks begin with the sum of the first, whose mean is logged."""
        self._sum, self._batches = state_dict["sum"], state_dict["batches"]
        self._last_step, self._recorded = state_dict["last_step"], state_dict["recorded"]
        self.epoch = state_dict["epoch"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Add this step's loss and log if it is time."""
        # Lightning divides the loss by the number of accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self._sum = loss if self._sum is None else self._sum + loss
        self._batches += 1
        self.epoch = trainer.current_epoch
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._last_step:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._recorded = self._sum / self._batches
            pl_module.log("loss", self._recorded, prog_bar=True, logger=False, batch_size=1)
            if trainer.is_global_zero:
                record = {"loss": float(self._recorded), "learning_rate": float(rate)}
                for logger in trainer.loggers:
                    # Steps are counted from 0 in logs, as by Lightning.
                    logger.log_metrics({"epoch": trainer.current_epoch, **record}, step=step - 1)
            self._sum, self._batches, self._last_step = None, 0, step

    def last(self) -> float | None:
        """The last record; where there is none yet, the mean of the steps so far, if any."""
        if self._recorded is None and self._sum is not None:
            return float(self._sum / self._batches)
        return None if self._recorded is None else float(self._recorded)
