"""Where the loss of a training is recorded: CSV, TensorBoard, Weights & Biases, or nowhere."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from memfree.first_process import is_first_process
from memfree.folders.atomic_files import write_text
from memfree.models.loss_log import LossLog
from memfree.models.options import LoggerName

WANDB_PROJECT = "memfree"
"""Project of the runs where the environment variable WANDB_PROJECT names no other."""


def check_logger(name: LoggerName) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        ValueError: names it.
    """
    if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"--trainer.logger {name} needs the package {name}: install memfree[{name}], or use "
            "--trainer.logger csv"
        )


def build_logger(name: LoggerName, out: Path, logs: str, step: int = 0) -> Logger | None:
    """The logger of this name, which writes below ``out``: call it where that is claimed.

    W&B runs are called after the model folder, whose path is in their configuration, and a resumed
    training continues its run. W&B's own variables count: WANDB_MODE=offline keeps runs below the
    folder, without a network.

    Args:
        name: which.
        out: the model folder.
        logs: folder in it for what the logger writes.
        step: optimizer step that training begins or goes on with; what was logged from there on
            by an earlier run does not count any more.
    """
    if name == "none":
        return None
    if name == "csv":
        return LossLog(out / logs)
    if name == "tensorboard":
        return TensorBoardLogger(out, name=logs, version=0, purge_step=step)
    return _wandb(out, logs)


def finish(logger: Logger | None) -> None:
    """End what a logger keeps open: the next training of this process has a W&B run of its own."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()


def _wandb(out: Path, logs: str) -> Logger:
    folder = out / logs
    known = folder / "wandb_id"  # goes with the logs where a model is overwritten
    if is_first_process() and not known.is_file():
        write_text(known, secrets.token_hex(4))
    path = out.resolve()
    return WandbLogger(
        name="/".join(path.parts[-2:]),
        save_dir=folder,
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        version=known.read_text(encoding="utf-8") if known.is_file() else None,
        config={"folder": str(path)},
    )
