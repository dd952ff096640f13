"""The first thing that a training does, when all of its processes are there."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from memfree.models.checkpoints import step_of
from memfree.models.claim import LOGS, Claim, begin
from memfree.models.loggers import build_logger
from memfree.models.options import LoggerName


class Beginning(pl.Callback):
    """Makes room in the folder and opens its log, once every process has looked at the folder.

    Processes that a launcher starts together look at it at different times: were another model
    deleted by the first before, they would find different things, or checkpoints half deleted. To
    be the first of the callbacks: others look for checkpoints.

    Args:
        out: the model folder.
        claimed: what ``claim`` found there.
        logger: where the loss is recorded.
    """

    def __init__(self, out: Path, claimed: Claim, logger: LoggerName) -> None:
        self._out, self._claimed, self._logger = out, claimed, logger

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin on the first process, while the others wait."""
        begin(self._out, self._claimed)
        trainer.strategy.barrier("the folder is ready")
        checkpoint = self._claimed.checkpoint
        step = 0 if checkpoint is None else step_of(checkpoint)
        trainer.logger = build_logger(self._logger, self._out, LOGS, step)
