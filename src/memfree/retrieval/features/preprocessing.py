"""Differentiable image preprocessing for a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
Fit = Literal["shorter", "longer", "exact"]
_OPEN_CLIP_FITS: dict[str, Fit] = {"shortest": "shorter", "longest": "longer", "squash": "exact"}
_TIMM_FITS: dict[str, Fit] = {"squash": "exact", "border": "longer"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise images (B, 3, H, W) in [-1, 1] of any size. Unlike PIL, it neither
    rounds to bytes nor clips bicubic overshoot: both would stop gradients."""

    resize: tuple[int, int]
    """Height and width that ``fit`` refers to, in pixels."""
    fit: Fit
    """shorter: keep proportions, cover ``resize``; longer: keep them, stay within it; exact: change
    proportions to have exactly this size."""
    crop: tuple[int, int] | None
    """Height and width of the centre crop, padded where the image is smaller."""
    mean: tuple[float, ...]
    """Subtracted from values in [0, 1], per channel."""
    std: tuple[float, ...]
    """Divided by, per channel."""
    interpolation: str = "bilinear"
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Colour in [0, 1] around images that are smaller than ``crop``."""

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation {self.interpolation!r} has no gradient here; "
                f"use one of {', '.join(_INTERPOLATIONS)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Network input (B, 3, h, w) of images (B, 1 or 3, H, W) in [-1, 1]."""
        images = (as_rgb(images) + 1) / 2
        images = transforms.resize(
            images,
            self._size(images.shape[-2], images.shape[-1]),
            InterpolationMode(self.interpolation),
            antialias=True,
        )
        if self.crop is not None:
            fill = _channels(self.fill, images)
            images = transforms.center_crop(images - fill, list(self.crop)) + fill
        return (images - _channels(self.mean, images)) / _channels(self.std, images)

    def _size(self, height: int, width: int) -> list[int]:
        if self.fit == "exact":
            return list(self.resize)
        if self.fit == "shorter" and self.resize[0] == self.resize[1]:
            return [self.resize[0]]  # torchvision's own rule, which rounds down
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.fit == "shorter" else max(ratios)
        return [round(height / ratio), round(width / ratio)]

    def describe(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def of_open_clip(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read open_clip's preprocessing configuration of a model."""
        size = config["size"]
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        mode = config.get("resize_mode", "shortest")
        if mode not in _OPEN_CLIP_FITS:
            raise ValueError(f"the CLIP model's resize_mode {mode!r} is not known")
        return cls(
            resize=size,
            fit=_OPEN_CLIP_FITS[mode],
            crop=None if mode == "squash" else size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config.get("interpolation", "bicubic"),
            fill=(config.get("fill_color", 0) / 255,) * 3,
        )

    @classmethod
    def of_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read timm's data configuration of a model, as its evaluation transform does."""
        channels, *size = config["input_size"]
        if channels != 3:
            raise ValueError(f"the timm model takes {channels} channels, not 3")
        scaled = tuple(floor(side / config["crop_pct"]) for side in size)
        return cls(
            resize=(scaled[0], scaled[1]),
            fit=_TIMM_FITS.get(config["crop_mode"], "shorter"),
            crop=(size[0], size[1]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            fill=tuple(round(255 * value) / 255 for value in config["mean"]),
        )


def as_rgb(images: Tensor) -> Tensor:
    """Convert images (B, 1 or 3, H, W) to three channels, in float32 at least."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        given = images.shape[1] if images.ndim == 4 else tuple(images.shape)
        raise ValueError(f"the network needs images of 1 or 3 channels, not {given}")
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, size, size), bilinear with antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
