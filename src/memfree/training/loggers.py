"""Loggers of a training: the loss to CSV, TensorBoard or Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from memfree.folders.atomic import write_atomic, write_text
from memfree.models.module import DiffusionModule
from memfree.models.options import LoggerName
from memfree.slurm.launcher import is_first_process

SAVED_EVERY = 100  # optimizer steps between writes of new rows to disk


class LossLog(CSVLogger):
    """Writes ``folder/version_0/metrics.csv`` atomically, before checkpoints: no row is lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent, folder.name, version=0)
        self.path = Path(self.log_dir) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._saved = 0
        self._last_step = 0

    @rank_zero_only
    def keep_before(self, step: int) -> None:
        """Keep an earlier run's rows before optimizer step ``step``."""
        self._rows, self._saved = [], 0
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
            self._rows = [row for row in rows if int(row["step"]) < step]
            self._saved = len(self._rows) if len(self._rows) == len(rows) else -1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; write the file now and then."""
        assert step is not None
        self._rows.append({**metrics, "step": step})
        if step - self._last_step >= SAVED_EVERY:
            self._last_step = step
            self.save()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is saved beside the model."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file if it lacks rows."""
        if self._saved == len(self._rows):
            return
        names = sorted({name for row in self._rows for name in row})

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self._rows)

        write_atomic(self.path, write)
        self._saved = len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows."""
        self.save()


_KEPT = ("sum", "batches", "last_step", "recorded", "epoch")  # by LossRecord in checkpoints


class LossRecord(Callback):
    """Logs ``loss``, the mean since the last record, and ``learning_rate``.

    Cheaper than a DiffusionModule's ``log`` at each step. Goes to the loggers directly: Lightning
    would wait until after that step's checkpoint. ``callback_metrics`` have it as ``loss`` and
    ``train/loss``. ``epoch`` is that of the last batch over all resumed runs.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.sum: Tensor | None = None  # since the last record
        self.batches = 0
        self.last_step = -1
        self.recorded: Tensor | None = None
        self.epoch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the log of the resumed run, if any."""
        if isinstance(pl_module, DiffusionModule):
            pl_module.logs_loss = False
        if self.sum is not None:
            self.sum = self.sum.to(pl_module.device)
        for logger in trainer.loggers:
            if isinstance(logger, LossLog):
                logger.keep_before(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The sum since the last record, and that record."""
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; all ranks start with the first rank's sum, whose mean is logged."""
        for name in _KEPT:
            setattr(self, name, state_dict[name])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Add this step's loss; log it when due."""
        # Lightning divides the loss by the number of accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.sum = loss if self.sum is None else self.sum + loss
        self.batches += 1
        self.epoch = trainer.current_epoch
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self.last_step:
            self.recorded = self.sum / self.batches
            for name in ("loss", "train/loss"):
                shown = name == "loss"
                pl_module.log(name, self.recorded, prog_bar=shown, logger=False, batch_size=1)
            if trainer.is_global_zero:
                rate = float(trainer.optimizers[0].param_groups[0]["lr"])
                record = {"loss": float(self.recorded), "learning_rate": rate}
                for logger in trainer.loggers:
                    # Logs count steps from 0, like Lightning.
                    logger.log_metrics({"epoch": trainer.current_epoch, **record}, step=step - 1)
            self.sum, self.batches, self.last_step = None, 0, step

    def last(self) -> float | None:
        """The last record; before the first, the mean of the steps so far, if any."""
        if self.recorded is None and self.sum is not None:
            return float(self.sum / self.batches)
        return None if self.recorded is None else float(self.recorded)


def check_logger(name: LoggerName) -> None:
    """Refuse a logger whose package is not installed."""
    if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"--trainer.logger {name} needs the package {name}: install memfree[{name}], or use "
            "--trainer.logger csv"
        )


def build_logger(name: LoggerName, out: Path, logs: str, step: int = 0) -> Logger | None:
    """Create the named logger below ``out / logs``, once the folder is claimed.

    Entries from ``step`` on are dropped. W&B runs are named after the model folder and resumed with
    it; W&B's variables apply: with WANDB_MODE=offline, runs stay below the folder.
    """
    if name == "none":
        return None
    folder = out / logs
    if name == "csv":
        return LossLog(folder)
    if name == "tensorboard":
        return TensorBoardLogger(
            out, name=logs, version=0, purge_step=step, default_hp_metric=False
        )
    run_id = folder / "wandb_id"  # deleted with the logs when a model is overwritten
    if is_first_process() and not run_id.is_file():
        write_text(run_id, secrets.token_hex(4))
    path = out.resolve()
    return WandbLogger(
        name="/".join(path.parts[-2:]),
        save_dir=folder,
        project=os.environ.get("WANDB_PROJECT", "memfree"),
        version=run_id.read_text(encoding="utf-8") if run_id.is_file() else None,
        config={"folder": str(path)},
    )


def finish(logger: Logger | None) -> None:
    """End a W&B run, so that this process's next training gets its own."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
