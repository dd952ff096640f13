"""DiffusionModule: random numbers, optimizer and identity of every training."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from memfree.data.random_streams import step_seed
from memfree.folders.claim import first_difference
from memfree.models.options import ModelOptions

CHECKPOINT_KEY = "memfree"


class DiffusionModule(pl.LightningModule, ABC):
    """A network that learns to predict ε or v, and the diffusers pipeline that it becomes.

    What a step draws (noise, noise levels, dropped conditions, dropout) depends on the seed, the
    epoch, the batch's number and the rank only, so a resumed run draws what an uninterrupted one
    would have.

    Attributes:
        network: the denoising network, a diffusers model.
        noise_scheduler: the diffusers scheduler of training, saved with the model.
        alphas_cumprod: ᾱ_t of every training timestep, (T,) float32.
    """

    network: nn.Module
    noise_scheduler: Any
    alphas_cumprod: Tensor

    def __init__(
        self,
        options: ModelOptions,
        image_shape: tuple[int, int, int],
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Keep what all modules keep; a subclass then makes its network.

        Args:
            options: network, noise schedule, optimisation.
            image_shape: (C, H, W) of the training images.
            seed: of weights and of all that training draws.
            data: what the images are, JSON values (hash, order, augmentation); recorded in
                checkpoints, so that one of other data is not resumed.
            stepping: how the Trainer takes a step, JSON values (clipping, accumulation, precision);
                recorded like ``data``.

        Raises:
            ValueError: options that do not fit together.
        """
        super().__init__()
        if options.ema_decay >= 1:
            raise ValueError(
                f"--model.ema_decay {options.ema_decay:g} would keep the initial weights for ever: "
                "use a number below 1, or 0 for no average"
            )
        self.options = options
        self.image_shape = image_shape
        self.seed = seed
        self.data = data
        self.stepping = stepping

    def set_network(self, network: Any, noise_scheduler: Any) -> None:
        """Take the network and the scheduler whose noise levels it is trained on."""
        self.network = network
        self.noise_scheduler = noise_scheduler
        # Not persistent: the options say it all, and a checkpoint holds weights only.
        self.register_buffer(
            "alphas_cumprod", noise_scheduler.alphas_cumprod.float(), persistent=False
        )
        if self.options.compile:
            network.compile()

    @abstractmethod
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss of a batch, 0-d, with all that it draws from ``generator`` (on the device)."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The diffusers pipeline that this model is."""

    @abstractmethod
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Samples (count, C, H, W) in [−1, 1] from fixed noise by DDIM, to be looked at."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the manifest of the model folder says of the model, JSON values."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted mean squared error of the prediction at random noise levels."""
        return self.loss(batch, self.step_generator(batch_idx))

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """The generator of this step's draws; also seeds the global one if dropout uses it."""
        seed = step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.options.network.dropout:
            torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up, then a cosine to 0 or a constant rate."""
        total = float(self.trainer.estimated_stepping_batches)
        constant = self.options.learning_rate_schedule == "constant" or not math.isfinite(total)
        return adamw(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            self.options.learning_rate,
            warm_up(self.options.warmup_steps, None if constant else total),
            self.options.weight_decay,
            # Lightning refuses to clip gradients for a fused optimizer under mixed precision.
            fused=self.trainer.precision == "32-true",
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed, as JSON values."""
        options = asdict(self.options)
        # Compiling, checkpointing and caching change speed, not the model.
        options.pop("compile")
        for name in ("gradient_checkpointing", "cache"):
            options["finetune"].pop(name)
        identity = {
            "model": options,
            "image_shape": list(self.image_shape),
            **self.facts(),
            "data": self.data,
            "trainer": self.stepping,
            "seed": self.seed,
        }
        # Through JSON: numbers become plain ones, which a checkpoint may hold.
        return json.loads(json.dumps(identity))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write into the checkpoint which model it is of."""
        checkpoint[CHECKPOINT_KEY] = self.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before its weights are copied."""
        difference = first_difference(checkpoint.get(CHECKPOINT_KEY), self.identity())
        if difference:
            raise ValueError(f"the checkpoint is of another model: {difference}")


def weighted_mean(error: Tensor, weight: Tensor | float) -> Tensor:
    """Mean over images of weight · mean over elements, of squared errors (B, ...)."""
    if isinstance(weight, Tensor) and weight.ndim:
        return (weight * error.flatten(1).mean(1)).mean()
    return weight * error.mean()


def adamw(
    parameters: Iterable[Any],
    rate: float,
    schedule: Callable[[Optimizer], LRScheduler],
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: AdamW, and its schedule by steps.

    Args:
        parameters: or groups of them, which may have a weight decay of their own.
        rate: highest learning rate.
        schedule: makes the schedule of the optimizer: ``warm_up(...)``, or one of torch's.
        weight_decay: of parameters without one of their own.
        fused: one kernel for all parameters; None: as torch chooses.
    """
    # Plain floats: a checkpoint with jsonargparse's would not load with weights_only.
    optimizer = torch.optim.AdamW(
        parameters, lr=float(rate), weight_decay=float(weight_decay), fused=fused
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"},
    }


def warm_up(warm: int, total: float | None) -> Callable[[Optimizer], LRScheduler]:
    """A linear rise of the rate over ``warm`` steps, then a cosine to 0 at step ``total``.

    With None for ``total`` the rate stays at its highest.
    """

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if total is None:
            return 1.0
        done = min((step - warm) / max(total - warm, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return partial(LambdaLR, lr_lambda=factor)
