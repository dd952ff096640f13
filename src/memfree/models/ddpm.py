"""Pixel-space denoising diffusion as a Lightning module around a diffusers U-Net."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)
from torch import Tensor

from memfree.difference import first_difference
from memfree.diffusion_math import per_sample, training_target
from memfree.models.network import NetworkOptions, build_network
from memfree.models.noise_schedule import NoiseOptions, build_scheduler

CHECKPOINT_KEY = "memfree"


@dataclass(frozen=True)
class ModelOptions:
    """The model and how its weights are found."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    class_conditional: bool = False
    """Whether the network is told the label; needs a labelled dataset folder."""
    label_dropout: ClosedUnitInterval = 0.1
    """Share of training labels replaced by "no class", for classifier-free guidance."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate of AdamW, reached after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps over which the learning rate rises linearly."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to 0 at the last step along a cosine, or constant."""
    ema_decay: ClosedUnitInterval = 0.995
    """Decay a step, below 1, of the average of the weights, which is what is saved; 0: none."""
    compile: bool = False
    """Whether torch.compile compiles the network."""


class DDPMModule(pl.LightningModule):
    """Trains a U-Net to predict ε or v, unconditionally or with labels.

    A batch is a dict: ``image`` (B, C, H, W) in [-1, 1]; ``label`` (B,) int64 for a
    class-conditional model; optionally ``weight``, a number or (B,), which multiplies the loss.

    What a step draws (noise, noise levels, dropped labels, dropout) depends on the seed, the
    epoch, the batch's number and the rank only, so a resumed run draws what an uninterrupted one
    would have.
    """

    def __init__(
        self,
        options: ModelOptions,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Build the network with weights drawn from ``seed``.

        Args:
            options: network, noise schedule, optimisation.
            image_shape: (C, H, W).
            num_classes: labels are 0 to num_classes − 1; needed by a class-conditional model.
            seed: of weights and of all that training draws.
            data: what the images are, JSON values (hash, order, augmentation); recorded in
                checkpoints, so that one of other data is not resumed.
            stepping: how the Trainer takes a step, JSON values (clipping, accumulation, precision);
                recorded like ``data``.

        Raises:
            ValueError: options that do not fit together, or no labels for a conditional model.
        """
        super().__init__()
        if options.ema_decay >= 1:
            raise ValueError(
                f"--model.ema_decay {options.ema_decay:g} would keep the initial weights for ever: "
                "use a number below 1, or 0 for no average"
            )
        if options.class_conditional and num_classes is None:
            raise ValueError(
                "--model.class_conditional needs labels, and the dataset has none: "
                "set it to false or prepare labelled data"
            )
        self.options = options
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes if options.class_conditional else None
        self.seed = seed
        self.data = data
        self.stepping = stepping
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = build_network(options.network, image_shape, self.num_classes)
        self.noise_scheduler = build_scheduler(options.noise)
        self.alphas_cumprod: Tensor
        # Not persistent: the options say it all, and a checkpoint holds weights only.
        self.register_buffer(
            "alphas_cumprod", self.noise_scheduler.alphas_cumprod.float(), persistent=False
        )
        if options.compile:
            self.network.compile()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted mean squared error of the prediction at random noise levels."""
        return self.loss(batch, self.step_generator(batch_idx))

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """The generator of this step's draws; also seeds the global one if dropout uses it."""
        numbers = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
        if self.options.network.dropout:
            torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Loss of a batch, 0-d: mean over images of weight · mean over pixels of the square.

        Args:
            batch: see the class.
            generator: on the batch's device.
        """
        x_0: Tensor = batch["image"]
        count, device = len(x_0), x_0.device
        noise = torch.randn(x_0.shape, generator=generator, device=device, dtype=x_0.dtype)
        t = torch.randint(len(self.alphas_cumprod), (count,), generator=generator, device=device)
        alpha_bar = self.alphas_cumprod[t]  # (B,)
        a = per_sample(alpha_bar, x_0)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        labels = None
        if self.num_classes is not None:
            dropped = (
                torch.rand(count, generator=generator, device=device) < self.options.label_dropout
            )
            labels = batch["label"].masked_fill(dropped, self.num_classes)
        prediction = self.network(x_t, t, class_labels=labels, return_dict=False)[0]
        target = training_target(x_0, noise, alpha_bar, self.options.noise.prediction_type)
        error = (prediction.float() - target).square()
        weight = batch.get("weight", 1.0)
        if isinstance(weight, Tensor) and weight.ndim:
            return (weight * error.flatten(1).mean(1)).mean()
        return weight * error.mean()

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up, then a cosine to 0 or a constant rate."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            # Plain floats: a checkpoint with jsonargparse's would not load with weights_only.
            lr=float(self.options.learning_rate),
            weight_decay=float(self.options.weight_decay),
            # Lightning refuses to clip gradients for a fused optimizer under mixed precision.
            fused=self.trainer.precision == "32-true",
        )
        factor = _rate_factor(self.options, float(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed, as JSON values."""
        options = asdict(self.options)
        # Compiling changes speed, not the model.
        options.pop("compile")
        identity = {
            "model": options,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
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


def _rate_factor(options: ModelOptions, total_steps: float) -> Any:
    """Learning rate at a step as a share of the highest, for LambdaLR."""

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        if options.learning_rate_schedule == "constant" or not math.isfinite(total_steps):
            return 1.0
        length = max(total_steps - options.warmup_steps, 1)
        done = min((step - options.warmup_steps) / length, 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor
