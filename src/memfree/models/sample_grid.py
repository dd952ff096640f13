"""Draws samples from the same noise during training, to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDIMScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from memfree.models.ddpm import DDPMModule
from memfree.models.ema import ExponentialMovingAverage


class SampleGrid(pl.Callback):
    """Writes ``samples-STEP.png``: one grid from fixed noise, by DDIM, from the averaged weights.

    The noise and, for a class-conditional model, the labels (0, 1, 2, ... in turn) are the same
    each time. Images also go to TensorBoard where that is the logger.
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
        """Draw a grid if it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last grid."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # global_step repeats while gradients accumulate over several batches.
        if not trainer.is_global_zero or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, DDPMModule)
        images = self.sample(pl_module, averaged_network(trainer, pl_module))
        grid = make_grid(images.clamp(-1, 1) / 2 + 0.5, nrow=round(self.count**0.5))
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, self.folder / f"samples-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)

    @torch.no_grad()
    def sample(self, module: DDPMModule, network: nn.Module) -> Tensor:
        """Sample the grid's images (count, C, H, W) on the module's device."""
        generator = torch.Generator().manual_seed(self.seed)
        x_t = torch.randn((self.count, *module.image_shape), generator=generator)
        x_t = x_t.to(module.device)
        labels = None
        if module.num_classes is not None:
            labels = torch.arange(self.count, device=module.device) % module.num_classes
        scheduler = DDIMScheduler.from_config(
            module.noise_scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(min(self.steps, module.options.noise.num_train_timesteps))
        was_training = network.training
        network.eval()
        for t in scheduler.timesteps:
            output = network(x_t, t.to(x_t.device), class_labels=labels, return_dict=False)[0]
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        network.train(was_training)
        return x_t


def averaged_network(trainer: pl.Trainer, module: DDPMModule) -> Any:
    """The network with averaged weights, or the one in training where nothing is averaged."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExponentialMovingAverage):
            return callback.average.network
    return module.network
