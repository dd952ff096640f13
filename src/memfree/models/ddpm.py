"""DDPM of pixels: network, noise schedule, and the module that trains them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor

from memfree.diffusion_math import per_sample, training_target
from memfree.models.module import DiffusionModule, weighted_mean
from memfree.models.options import ModelOptions, NetworkOptions, NoiseOptions


def build_scheduler(options: NoiseOptions) -> Any:
    """Build the diffusers scheduler that ``options`` describe.

    Raises:
        ValueError: diffusers has no such scheduler, or it does not work with cumulative alphas
            (flow matching, and schedulers that are trained on continuous noise levels).
    """
    scheduler_class: Any = scheduler_class_named(options.scheduler)
    wanted: dict[str, Any] = {
        "num_train_timesteps": options.num_train_timesteps,
        "beta_schedule": options.beta_schedule,
        "beta_start": options.beta_start,
        "beta_end": options.beta_end,
        "prediction_type": options.prediction_type,
        "clip_sample": options.clip_sample,
    }
    known = inspect.signature(scheduler_class.__init__).parameters
    missing = [name for name in wanted if name not in known and name != "clip_sample"]
    if missing:
        raise ValueError(
            f"--model.noise.scheduler {options.scheduler} has no {missing[0]}: choose one such as "
            "DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler"
        )
    try:
        scheduler = scheduler_class(**{k: v for k, v in wanted.items() if k in known})
    except NotImplementedError as error:
        raise ValueError(
            f"--model.noise.beta_schedule {options.beta_schedule} is not known to "
            f"{options.scheduler}: {error}"
        ) from error
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"--model.noise.scheduler {options.scheduler} has no alphas_cumprod")
    return scheduler


def scheduler_class_named(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler class of this name.

    Raises:
        ValueError: diffusers has none, so that a file cannot name any other class.
    """
    # Names without "Scheduler" are not looked up: attributes of diffusers import lazily.
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler called {name!r}")
    return found


def build_network(
    options: NetworkOptions, image_shape: tuple[int, int, int], num_classes: int | None = None
) -> Any:
    """Build the U-Net with fresh weights from torch's global generator.

    Args:
        options: size and shape.
        image_shape: (C, H, W) of the images.
        num_classes: None for an unconditional network. Otherwise the network knows
            ``num_classes + 1`` labels, the last of which is the null label "no class".

    Returns:
        A diffusers UNet2DModel (diffusers gives type checkers no nn.Module to see).

    Raises:
        ValueError: the options do not fit together or to the image.
    """
    _check(options, image_shape)
    channels, height, width = image_shape
    levels = range(len(options.block_out_channels))
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=tuple(
            "AttnDownBlock2D" if options.attention[level] else "DownBlock2D" for level in levels
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if options.attention[level] else "UpBlock2D"
            for level in reversed(levels)
        ),
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        attention_head_dim=options.attention_head_dim,
        resnet_time_scale_shift=options.time_scale_shift,
        dropout=options.dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def _check(options: NetworkOptions, image_shape: tuple[int, int, int]) -> None:
    channels = options.block_out_channels
    if not channels or len(channels) != len(options.attention):
        raise ValueError(
            f"--model.network.attention has {len(options.attention)} entries and "
            f"--model.network.block_out_channels {len(channels)}: give one for each resolution"
        )
    uneven = [count for count in channels if count % options.norm_num_groups]
    if uneven:
        raise ValueError(
            f"--model.network.norm_num_groups {options.norm_num_groups} does not divide "
            f"{uneven[0]} of --model.network.block_out_channels"
        )
    divisor = 2 ** (len(channels) - 1)
    if image_shape[1] % divisor or image_shape[2] % divisor:
        raise ValueError(
            f"images of {image_shape[1]}x{image_shape[2]} pixels cannot be halved "
            f"{len(channels) - 1} times: shorten --model.network.block_out_channels or prepare "
            f"the data at a multiple of {divisor}"
        )
    if options.dropout >= 1:
        raise ValueError(f"--model.network.dropout is {options.dropout}, but must be below 1")


class DDPMModule(DiffusionModule):
    """Trains a U-Net to predict ε or v, unconditionally or with labels.

    A batch is a dict: ``image`` (B, C, H, W) in [-1, 1]; ``label`` (B,) int64 for a
    class-conditional model; optionally ``weight``, a number or (B,), which multiplies the loss.
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
            options: network, noise schedule, optimisation; a mapping, as checkpoints have it, of
                the same names.
            image_shape: (C, H, W).
            num_classes: labels are 0 to num_classes − 1; needed by a class-conditional model.
            seed: of weights and of all that training draws.
            data: what the images are; see ``DiffusionModule``.
            stepping: how the Trainer takes a step; see ``DiffusionModule``.

        Raises:
            ValueError: options that do not fit together, or no labels for a conditional model.
        """
        super().__init__(options, image_shape, seed, data, stepping)
        self.keep_arguments(num_classes=num_classes)
        options = self.options
        if options.class_conditional and num_classes is None:
            raise ValueError(
                "--model.class_conditional needs labels, and the dataset has none: "
                "set it to false or prepare labelled data"
            )
        self.num_classes = num_classes if options.class_conditional else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(options.network, self.image_shape, self.num_classes)
        self.set_network(network, build_scheduler(options.noise))

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
        labels = None
        if self.num_classes is not None:
            dropped = (
                torch.rand(count, generator=generator, device=device) < self.options.label_dropout
            )
            labels = batch["label"].masked_fill(dropped, self.num_classes)
        error = self.squared_error(x_0, noise, t, labels)
        return weighted_mean(error, batch.get("weight", 1.0))

    def clean(
        self, batch: dict[str, Any], noise: Callable[[Sequence[int]], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The images and, for a class-conditional model, their labels, or "no class" without."""
        x_0: Tensor = batch["image"]
        if self.num_classes is None:
            return x_0, None
        none = torch.full((len(x_0),), self.num_classes, device=x_0.device)
        return x_0, batch.get("label", none)

    def squared_error(
        self, x_0: Tensor, noise: Tensor, t: Tensor, conditions: Tensor | None
    ) -> Tensor:
        """Squared errors (B, C, H, W) of the prediction of ε or v; see ``DiffusionModule``."""
        alpha_bar = self.alphas_cumprod[t]  # (B,)
        a = per_sample(alpha_bar, x_0)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        prediction = self.network(x_t, t, class_labels=conditions, return_dict=False)[0]
        target = training_target(x_0, noise, alpha_bar, self.options.noise.prediction_type)
        return (prediction.float() - target).square()

    def facts(self) -> dict[str, Any]:
        """The number of classes, null for an unconditional model."""
        return {"num_classes": self.num_classes}

    def _pipeline(self) -> Any:
        """A ``DDPMPipeline``: the network and the scheduler."""
        pipeline: Any = DDPMPipeline
        return pipeline(unet=self.network, scheduler=self.noise_scheduler)

    @torch.no_grad()
    def preview(self, count: int, steps: int, seed: int) -> Tensor:
        """Samples (count, C, H, W); labels are 0, 1, 2, ... in turn."""
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn((count, *self.image_shape), generator=generator, dtype=torch.float32)
        x_t = x_t.to(self.device)
        labels = None
        if self.num_classes is not None:
            labels = torch.arange(count, device=self.device) % self.num_classes
        scheduler = DDIMScheduler.from_config(
            self.noise_scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(min(steps, len(self.alphas_cumprod)))
        was_training = self.network.training
        self.network.eval()
        for t in scheduler.timesteps:
            output = self.network(x_t, t.to(x_t.device), class_labels=labels, return_dict=False)[0]
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        self.network.train(was_training)
        return x_t.clamp(-1, 1)
