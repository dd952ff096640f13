"""Draws samples from the same noise during training, to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.utils import make_grid, save_image

from memfree.folders.atomic_files import write_atomic
from memfree.models.ema import ExponentialMovingAverage
from memfree.models.module import DiffusionModule


class SampleGrid(pl.Callback):
    """Writes ``samples-STEP.png``: one grid from fixed noise, by DDIM, from the averaged weights.

    The noise and the conditions (labels in turn, or training captions) are the same each time.
    Images also go to TensorBoard where that is the logger.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        count: int = 36,
        steps: int = 25,
        seed: int = 0,
    ) -> None:
        """Draw every ``every_n_steps`` optimizer steps and at the end.

        Args:
            folder: where the grids go.
            every_n_steps: 1 or more.
            count: images of a grid.
            steps: DDIM steps of a sample.
            seed: of the fixed noise.
        """
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.count = count
        self.steps = steps
        self.seed = seed
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Draw a grid if it is time.

        That of the last step is drawn here too: after its checkpoint a killed run has nothing left
        to train, and so no end of training.
        """
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last grid."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # global_step repeats while gradients accumulate over several batches.
        if not trainer.is_global_zero or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, DiffusionModule)
        averaged = averaged_module(trainer, pl_module)
        images = averaged.preview(self.count, self.steps, self.seed).float()
        grid = make_grid(images / 2 + 0.5, nrow=round(self.count**0.5))
        write_atomic(
            self.folder / f"samples-{trainer.global_step:07d}.png",
            lambda path: save_image(grid, path, format="png"),
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)


def averaged_module(trainer: pl.Trainer, module: DiffusionModule) -> DiffusionModule:
    """The module with averaged weights, or the one in training where nothing is averaged."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExponentialMovingAverage):
            average = callback.average
            assert isinstance(average, DiffusionModule)
            return average
    return module
