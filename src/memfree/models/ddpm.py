"""Pixel-space DDPM: the network, its noise schedule, and the training module."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor

from memfree.models.module import DiffusionModule, Normal
from memfree.models.options import ModelOptions, NetworkOptions, NoiseOptions


def build_scheduler(options: NoiseOptions) -> Any:
    """Build the diffusers scheduler of ``options``; ValueError without cumulative alphas."""
    name = f"--model.noise.scheduler {options.scheduler}"
    scheduler_class: Any = scheduler_class_named(options.scheduler)
    wanted = {key: value for key, value in asdict(options).items() if key != "scheduler"}
    known = inspect.signature(scheduler_class.__init__).parameters
    missing = [key for key in wanted if key not in known and key != "clip_sample"]
    if missing:
        raise ValueError(
            f"{name} has no {missing[0]}: choose one such as DDPMScheduler, DDIMScheduler or "
            "DPMSolverMultistepScheduler"
        )
    try:
        scheduler = scheduler_class(**{k: v for k, v in wanted.items() if k in known})
    except NotImplementedError as error:
        raise ValueError(
            f"--model.noise.beta_schedule {options.beta_schedule} is not known to "
            f"{options.scheduler}: {error}"
        ) from error
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no alphas_cumprod")
    return scheduler


def scheduler_class_named(name: str) -> type[SchedulerMixin]:
    """Return the diffusers scheduler class of this name; ValueError for anything else."""
    # Names without "Scheduler" are not looked up: attributes of diffusers import lazily.
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler called {name!r}")
    return kind


def build_network(
    options: NetworkOptions, image_shape: tuple[int, int, int], num_classes: int | None = None
) -> Any:
    """Build a U-Net with weights from torch's global generator; the last label is "no class"."""
    _check(options, image_shape)
    channels, height, width = image_shape
    attention = options.attention
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
        up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in attention[::-1]),
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        attention_head_dim=options.attention_head_dim,
        resnet_time_scale_shift=options.time_scale_shift,
        dropout=options.dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def _check(options: NetworkOptions, image_shape: tuple[int, int, int]) -> None:
    channels, (_, height, width) = options.block_out_channels, image_shape
    groups = options.norm_num_groups
    divisor = 2 ** (max(len(channels), 1) - 1)
    uneven = next((count for count in channels if count % groups), None)
    checks = [
        (
            channels and len(channels) == len(options.attention),
            f"attention has {len(options.attention)} entries and --model.network."
            f"block_out_channels {len(channels)}: give one for each resolution",
        ),
        (
            uneven is None,
            f"norm_num_groups {groups} does not divide {uneven} of --model.network."
            "block_out_channels",
        ),
        (
            height % divisor == width % divisor == 0,
            f"block_out_channels: images of {height}x{width} pixels cannot be halved "
            f"{len(channels) - 1} times; shorten it or prepare data at a multiple of {divisor}",
        ),
        (options.dropout < 1, f"dropout is {options.dropout}, but must be below 1"),
    ]
    for fits, message in checks:
        if not fits:
            raise ValueError(f"--model.network.{message}")


class DDPMModule(DiffusionModule):
    """Trains a U-Net to predict ε or v on batches of ``image`` (B, C, H, W) in [-1, 1], ``label``
    (B,) int64 if class-conditional, and optionally ``weight``, a number or (B,), of the loss."""

    def __init__(
        self,
        options: ModelOptions,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        seed: int = 0,
        data: dict[str, Any] | None = None,
        stepping: dict[str, Any] | None = None,
    ) -> None:
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

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.image_shape

    def clean(self, batch: dict[str, Any], normal: Normal) -> Tensor:
        """The images."""
        return batch["image"]

    def conditions(self, batch: dict[str, Any], dropped: Tensor | None) -> Tensor | None:
        """Labels, "no class" where dropped or, in validation, unknown; None if unconditional."""
        if self.num_classes is None:
            return None
        if dropped is not None:
            return batch["label"].masked_fill(dropped, self.num_classes)
        images = batch["image"]
        none = torch.full((len(images),), self.num_classes, device=images.device)
        return batch.get("label", none)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Tensor | None) -> Tensor:
        """The network's prediction of ε or v."""
        return self.network(x_t, t, class_labels=conditions, return_dict=False)[0]

    def facts(self) -> dict[str, Any]:
        """The number of classes, null for an unconditional model."""
        return {"num_classes": self.num_classes}

    def _pipeline(self) -> Any:
        pipeline: Any = DDPMPipeline
        return pipeline(unet=self.network, scheduler=self.noise_scheduler)

    def sampled(self, x_t: Tensor, scheduler: Any, steps: int) -> Tensor:
        """Draw images with DDIM; labels cycle through 0, 1, 2, ..."""
        labels = None
        if self.num_classes is not None:
            labels = torch.arange(len(x_t), device=x_t.device) % self.num_classes
        scheduler.set_timesteps(min(steps, len(self.alphas_cumprod)))
        for t in scheduler.timesteps:
            output = self.predict_noise(x_t, t.to(x_t.device), labels)
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        return x_t.clamp(-1, 1)
