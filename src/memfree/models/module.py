"""DiffusionModule: training of diffusion models with Lightning."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from memfree.data.random_streams import Stream, generator_of, step_seed
from memfree.diffusion_math import per_sample, training_target
from memfree.folders.claim import first_difference
from memfree.folders.untrusted import check_plain
from memfree.models.options import ModelOptions

CHECKPOINT_KEY = "memfree"
VALIDATED_AT = (0.125, 0.375, 0.625, 0.875)
"""Noise levels of validation, as shares of the training timesteps."""


Normal = Callable[[Sequence[int]], Tensor]
"""Draws standard normal noise (B, *shape) for a shape."""


class DiffusionModule(pl.LightningModule, ABC):
    """A network that learns to predict ε or v, and the diffusers pipeline that it becomes.

    What a step draws (noise, noise levels, dropped conditions, dropout) depends only on seed,
    epoch, batch number and rank, so a resumed run repeats an uninterrupted one. ``alphas_cumprod``
    (T,) is ᾱ_t; ``has_averaged_weights``: averaged weights were loaded and not trained since;
    ``logs_loss``, off under ``LossRecord``, logs every step's loss, which costs part of a
    millisecond.
    """

    network: nn.Module
    noise_scheduler: Any
    alphas_cumprod: Tensor
    has_averaged_weights: bool = False
    logs_loss: bool = True

    def __init__(
        self,
        options: ModelOptions,
        image_shape: tuple[int, int, int],
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
        """Keep what all modules share; a subclass then calls ``set_network``.

        Args:
            image_shape: (C, H, W) of the training images.
            seed: seeds the weights and all random numbers of training.
            data: JSON values that identify the images; a checkpoint of other data is not resumed.
            stepping: how the Trainer steps (clipping, accumulation, precision), recorded like
                ``data``.
        """
        super().__init__()
        options = ModelOptions.of(options)
        if options.ema_decay >= 1:
            raise ValueError(
                f"--model.ema_decay {options.ema_decay:g} would keep the initial weights for ever: "
                "use a number below 1, or 0 for no average"
            )
        self.options = options
        self.image_shape = image_shape[0], image_shape[1], image_shape[2]
        self.set_average(None)
        self.seed = seed
        self.data = data
        self.stepping = stepping

    def keep_arguments(self, **others: Any) -> None:
        """Save the arguments, and the subclass's own, for ``load_from_checkpoint``."""
        names = ("image_shape", "seed", "data", "stepping")
        arguments = {
            "options": asdict(self.options),
            **{name: getattr(self, name) for name in names},
        }
        # Through JSON: jsonargparse's numbers are not plain, and a checkpoint would not load.
        self.save_hyperparameters(json.loads(json.dumps({**arguments, **others})))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, with averaged weights if any; ``weights_only`` runs no code of it."""
        if isinstance(checkpoint_path, (str, Path)) and "://" not in str(checkpoint_path):
            kept = _kept_arguments(Path(checkpoint_path), weights_only)
            if not ({"options", "image_shape"} <= {*kept, *kwargs} or hparams_file):
                raise ValueError(
                    f"{checkpoint_path} is of an earlier memfree and has no hyper_parameters: "
                    "resume its training, whose next checkpoint has them, or load the finished "
                    "model by memfree.models.load_model"
                )
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )

    def set_network(self, network: Any, noise_scheduler: Any) -> None:
        """Set the network and the scheduler whose noise levels it is trained on."""
        self.network = network
        self.noise_scheduler = noise_scheduler
        # Not persistent: the options say it all, and a checkpoint holds weights only.
        self.register_buffer(
            "alphas_cumprod", noise_scheduler.alphas_cumprod.float(), persistent=False
        )
        if self.options.compile:
            network.compile()

    @property
    def average(self) -> DiffusionModule | None:
        """The copy with averaged weights, None without one."""
        return self._average[0]

    def set_average(self, average: DiffusionModule | None) -> None:
        """Set the copy with averaged weights, which a callback updates after every step."""
        # In a tuple: as a submodule its weights would be trained and saved with the module's own.
        self._average = (average,)

    def setup(self, stage: str) -> None:
        """Forget the average of an earlier training; Lightning calls this before each."""
        if stage == "fit":
            self.set_average(None)

    def on_train_start(self) -> None:
        """Note that the weights are no longer averaged ones."""
        self.has_averaged_weights = False

    def pipeline(self, averaged: bool = True) -> Any:
        """Return a diffusers pipeline with averaged weights if any, else those in training."""
        average = self.average if averaged else None
        return (self if average is None else average)._pipeline()

    @abstractmethod
    def _pipeline(self) -> Any:
        """The diffusers pipeline with the module's own weights."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fields of the model folder's manifest, JSON values."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is denoised: images or latents."""

    @abstractmethod
    def clean(self, batch: dict[str, Any], normal: Normal) -> Tensor:
        """Clean samples x_0 (B, C, h, w) of a batch; ``normal`` draws noise of a shape."""

    @abstractmethod
    def conditions(self, batch: dict[str, Any], dropped: Tensor | None) -> Any:
        """Labels or encoded captions of a batch, without the ``dropped`` (B,) bool ones."""

    @abstractmethod
    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
        """The network's prediction of ε or v (B, C, h, w)."""

    @abstractmethod
    def sampled(self, x_t: Tensor, scheduler: Any, steps: int) -> Tensor:
        """Draw images (B, C, H, W) in [−1, 1] from pure noise."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted mean squared error at random noise levels, 0-d. Logged as ``train/loss``, of
        this rank alone; in the progress bar Lightning would wait for the device each step."""
        loss = self.loss(batch, self.step_generator(batch_idx))
        if self.logs_loss:
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Return this step's generator; also seed the global one if dropout uses it."""
        seed = step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.options.network.dropout:
            torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Mean over images of weight · mean squared error, 0-d; draws only from ``generator``."""
        images: Tensor = batch["image"]
        count, device = len(images), images.device

        def normal(shape: Sequence[int]) -> Tensor:
            size = (count, *shape)
            return torch.randn(size, generator=generator, device=device, dtype=images.dtype)

        x_0 = self.clean(batch, normal)
        noise = normal(x_0.shape[1:])
        t = torch.randint(len(self.alphas_cumprod), (count,), generator=generator, device=device)
        dropped = torch.rand(count, generator=generator, device=device) < self.options.label_dropout
        error = self.squared_error(x_0, noise, t, self.conditions(batch, dropped))
        weight = batch.get("weight", 1.0)
        if isinstance(weight, Tensor) and weight.ndim:
            return (weight * error.flatten(1).mean(1)).mean()
        return weight * error.mean()

    def squared_error(self, x_0: Tensor, noise: Tensor, t: Tensor, conditions: Any) -> Tensor:
        """Squared errors (B, C, h, w) of the prediction at timesteps t (B,) int64."""
        alpha_bar = self.alphas_cumprod[t]  # (B,)
        a = per_sample(alpha_bar, x_0)
        prediction = self.predict_noise(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, conditions)
        kind = self.noise_scheduler.config.prediction_type
        return (prediction.float() - training_target(x_0, noise, alpha_bar, kind)).square()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error at levels ``VALIDATED_AT`` with noise fixed per ``row``, else per
        place in the batches. Logged as ``val/loss``, the mean over all ranks, of averaged weights
        if any; equal up to rounding however images are batched. ``weight`` is ignored."""
        count = len(batch["image"])
        places = range(batch_idx * count, (batch_idx + 1) * count)
        rows = batch["row"].tolist() if "row" in batch else places
        # Shards without a manifest do not say which image a record is, and give -1.
        numbers = [place if row < 0 else row for row, place in zip(rows, places, strict=True)]
        generators = [generator_of(number, Stream.VALIDATION) for number in numbers]

        def normal(shape: Sequence[int]) -> Tensor:
            drawn = [each.standard_normal(tuple(shape), np.float32) for each in generators]
            return torch.from_numpy(np.stack(drawn)).to(self.device)

        x_0 = self.clean(batch, normal)
        conditions = self.conditions(batch, None)
        losses = []
        for share in VALIDATED_AT:
            step = round(share * (len(self.alphas_cumprod) - 1))
            t = torch.full((count,), step, device=self.device)
            losses.append(self.squared_error(x_0, normal(x_0.shape[1:]), t, conditions).mean())
        loss = torch.stack(losses).mean()
        self.log("val/loss", loss, on_epoch=True, batch_size=count, sync_dist=True)
        return loss

    @torch.no_grad()
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Draw preview samples (count, C, H, W) in [−1, 1] with DDIM from fixed noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((count, *self.noise_shape), generator=generator, dtype=torch.float32)
        config = self.noise_scheduler.config
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
        was_training = self.training
        self.eval()
        images = self.sampled(noise.to(self.device), scheduler, steps)
        self.train(was_training)
        return images

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
        """JSON values that a checkpoint must agree on to be resumed."""
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
        """Record in the checkpoint which model it belongs to."""
        checkpoint[CHECKPOINT_KEY] = self.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before its weights are copied."""
        difference = first_difference(checkpoint.get(CHECKPOINT_KEY), self.identity())
        if difference:
            raise ValueError(f"the checkpoint is of another model: {difference}")
        self.has_averaged_weights = "averaging_state" in checkpoint


def _kept_arguments(path: Path, weights_only: bool) -> dict[str, Any]:
    check_plain(path)
    try:
        checkpoint = torch.load(path, "cpu", weights_only=weights_only, mmap=True)
        kept = checkpoint.get(DiffusionModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if {CHECKPOINT_KEY, "state_dict"} <= checkpoint.keys() and isinstance(kept, dict):
            return kept
        reason = "it lacks a part"
    except Exception as error:  # whatever torch raises for a third-party pickle
        reason = type(error).__name__
    raise ValueError(f"{path} is damaged or not a checkpoint of a model of memfree ({reason})")


def adamw(
    parameters: Iterable[Any],
    rate: float,
    schedule: Callable[[Optimizer], LRScheduler],
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> dict[str, Any]:
    """AdamW (groups or parameters) with a per-step schedule, for ``configure_optimizers``."""
    # Plain floats: a checkpoint with jsonargparse's would not load with weights_only.
    optimizer = torch.optim.AdamW(
        parameters, lr=float(rate), weight_decay=float(weight_decay), fused=fused
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"},
    }


def warm_up(warm: int, total: float | None) -> Callable[[Optimizer], LRScheduler]:
    """Linear warm-up over ``warm`` steps, then a cosine to 0 at ``total``; None: constant."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if total is None:
            return 1.0
        done = min((step - warm) / max(total - warm, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return partial(LambdaLR, lr_lambda=factor)
