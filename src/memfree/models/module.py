"""DiffusionModule: random numbers, optimizer and identity of every training."""

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
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from memfree.data.random_streams import Stream, generator_of, step_seed
from memfree.folders.claim import first_difference
from memfree.folders.untrusted import check_plain
from memfree.models.options import ModelOptions

CHECKPOINT_KEY = "memfree"
VALIDATED_AT = (0.125, 0.375, 0.625, 0.875)
"""Noise levels of validation, as shares of the training timesteps."""


class DiffusionModule(pl.LightningModule, ABC):
    """A network that learns to predict ε or v, and the diffusers pipeline that it becomes.

    What a step draws (noise, noise levels, dropped conditions, dropout) depends on the seed, the
    epoch, the batch's number and the rank only, so a resumed run draws what an uninterrupted one
    would have.

    Attributes:
        network: the denoising network, a diffusers model.
        noise_scheduler: the diffusers scheduler of training, saved with the model.
        alphas_cumprod: ᾱ_t of every training timestep, (T,) float32.
        has_averaged_weights: whether the weights were loaded from a checkpoint of a training that
            averaged them, and are the average; False again once they are trained.
        logs_loss: whether every training step logs its loss, which costs part of a millisecond;
            ``memfree.training.loggers.LossRecord``, which logs means, sets it to False.
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
        """Keep what all modules keep; a subclass then makes its network.

        Args:
            options: network, noise schedule, optimisation; or, as a checkpoint has them, a mapping
                of the same names.
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
        """Save what the module was made from, which ``load_from_checkpoint`` makes it from again.

        Args:
            others: arguments of the subclass alone, JSON values.
        """
        arguments = {
            "options": asdict(self.options),
            "image_shape": self.image_shape,
            "seed": self.seed,
            "data": self.data,
            "stepping": self.stepping,
            **others,
        }
        # Through JSON: what jsonargparse has made is not plain, and a checkpoint would not load.
        self.save_hyperparameters(json.loads(json.dumps(arguments)))

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
        """Make the module of a checkpoint, of ``memfree train`` or of any Trainer.

        Where the training averaged weights (``ExponentialMovingAverage``, or Lightning's own
        ``WeightAveraging``), they are the averaged ones, and ``has_averaged_weights`` is True;
        otherwise they are those in training.

        Args:
            checkpoint_path: the file, or one that is open.
            map_location: where weights go, as ``torch.load`` has it.
            hparams_file: see Lightning.
            strict: whether the weights must be exactly those of the module; default: yes.
            weights_only: read tensors and plain values alone, so that no code in the file can run.
            kwargs: arguments of the module that count instead of those in the checkpoint; what the
                model is must stay the same.

        Raises:
            ValueError: no checkpoint of such a module; one that does not say what it was made from
                (memfree of November 2026 or earlier); or arguments of another model.
            OSError: the file cannot be read.
        """
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

    def on_train_start(self) -> None:
        """From here on the weights are those in training."""
        self.has_averaged_weights = False

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
    def clean(
        self, batch: dict[str, Any], noise: Callable[[Sequence[int]], Tensor]
    ) -> tuple[Tensor, Any]:
        """What is noised of a batch, x_0 (B, C, h, w), and its conditions, none of them dropped.

        Args:
            batch: see the subclass.
            noise: draws standard normal noise (B, *shape) for a shape.
        """

    @abstractmethod
    def squared_error(self, x_0: Tensor, noise: Tensor, t: Tensor, conditions: Any) -> Tensor:
        """Squared errors (B, C, h, w) of the prediction, weighted as the loss weighs noise levels.

        Args:
            x_0: clean images or latents (B, C, h, w).
            noise: standard normal, like x_0.
            t: training timesteps (B,) int64.
            conditions: labels or encoded captions of all; see ``clean``.
        """

    @property
    def average(self) -> DiffusionModule | None:
        """The copy with averaged weights, which is no part of this module; None: there is none."""
        return self._average[0]

    def set_average(self, average: DiffusionModule | None) -> None:
        """Take the copy with averaged weights, or forget it.

        Args:
            average: of this module; it is changed from outside, after every step.
        """
        # In a tuple: as a submodule its weights would be trained and saved with the module's own.
        self._average = (average,)

    def setup(self, stage: str) -> None:
        """Forget the average of an earlier training; Lightning calls this before each."""
        if stage == "fit":
            self.set_average(None)

    def pipeline(self, averaged: bool = True) -> Any:
        """The diffusers pipeline that this model is.

        Args:
            averaged: with the averaged weights where ``ExponentialMovingAverage`` keeps them during
                training and after it; False: with the weights in training. Without that callback
                both are the module's own weights (``has_averaged_weights`` says what they are where
                a checkpoint was loaded).
        """
        average = self.average if averaged else None
        return (self if average is None else average)._pipeline()

    @abstractmethod
    def _pipeline(self) -> Any:
        """The diffusers pipeline with the module's own weights."""

    @abstractmethod
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Samples (count, C, H, W) in [−1, 1] from fixed noise by DDIM, to be looked at."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the manifest of the model folder says of the model, JSON values."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted mean squared error of the prediction at random noise levels, 0-d.

        It is logged as ``train/loss`` (``logs_loss``), of this rank alone, and not in the progress
        bar, for which Lightning would wait for the device after every step.

        Args:
            batch: see the subclass.
            batch_idx: number of the batch in its epoch.
        """
        loss = self.loss(batch, self.step_generator(batch_idx))
        if self.logs_loss:
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error at the noise levels ``VALIDATED_AT`` with noise fixed by image, 0-d.

        Equal for the same weights and batches, and up to rounding for the same images in other
        batches and on other ranks. It is logged as ``val/loss``, the mean over all images of all
        ranks. Where weights are averaged it is of the averaged ones.

        Args:
            batch: as in training, in which ``row`` (B,) int64 says which image has which noise;
                without it its place in the batches does. ``weight`` has no meaning.
            batch_idx: number of the batch.
        """
        count = len(batch["image"])
        places = range(batch_idx * count, (batch_idx + 1) * count)
        rows = batch["row"].tolist() if "row" in batch else places
        # Shards without a manifest do not say which image a record is, and give -1.
        numbers = [place if row < 0 else row for row, place in zip(rows, places, strict=True)]
        generators = [generator_of(row, Stream.VALIDATION) for row in numbers]

        def noise(shape: Sequence[int]) -> Tensor:
            drawn = [each.standard_normal(tuple(shape), np.float32) for each in generators]
            return torch.from_numpy(np.stack(drawn)).to(self.device)

        x_0, conditions = self.clean(batch, noise)
        last = len(self.alphas_cumprod) - 1
        losses = []
        for share in VALIDATED_AT:
            t = torch.full((count,), round(share * last), device=self.device)
            error = self.squared_error(x_0, noise(x_0.shape[1:]), t, conditions)
            losses.append(error.mean())
        loss = torch.stack(losses).mean()
        self.log("val/loss", loss, on_epoch=True, batch_size=count, sync_dist=True)
        return loss

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
        self.has_averaged_weights = "averaging_state" in checkpoint


def _kept_arguments(path: Path, weights_only: bool) -> dict[str, Any]:
    """What the module of a checkpoint was made from; empty where an earlier memfree wrote it.

    Raises:
        ValueError: it is not a checkpoint of a DiffusionModule.
        FileNotFoundError: there is none.
    """
    check_plain(path)
    try:
        found = torch.load(path, "cpu", weights_only=weights_only, mmap=True)
        kept = found.get(DiffusionModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if {CHECKPOINT_KEY, "state_dict"} <= found.keys() and isinstance(kept, dict):
            return kept
        reason = "it lacks a part"
    except Exception as error:  # whatever a pickle of someone else makes torch raise
        reason = type(error).__name__
    raise ValueError(f"{path} is damaged or not a checkpoint of a model of memfree ({reason})")


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
