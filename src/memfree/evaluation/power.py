"""What the measures can see: training images changed on purpose, and how many are called copies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

CHANGED_IMAGES = 100
"""Training images that are changed, at most."""


def changed_copies(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Known copies of training images, from hardly to clearly changed, by name.

    A false-positive rate says nothing of a measure that finds no copy at all; the share of these
    that it finds does.

    Args:
        images: (n, C, H, W) in [-1, 1].
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(deviation: float) -> Tensor:
        noise = torch.randn(images.shape, generator=generator)
        return (images + deviation * noise).clamp(-1, 1)

    return {
        "noise_0.05": noisy(0.05),
        "noise_0.1": noisy(0.1),
        "noise_0.2": noisy(0.2),
        "darker_20": 0.8 * (images + 1) - 1,
        "shifted_1": torch.roll(images, 1, -1),
        "mirrored": images.flip(-1),
        "cropped_12": _cropped(images, 0.125),
        "jpeg_50": _jpeg(images, 50),
        "blurred": _blurred(images, 1.0),
    }


def _cropped(images: Tensor, share: float) -> Tensor:
    """The middle, without this share of each side, at the old size."""
    height, width = images.shape[-2:]
    top, left = (max(1, round(side * share / 2)) for side in (height, width))
    window = images[..., top : height - top, left : width - left]
    return functional.interpolate(window, size=(height, width), mode="bilinear").clamp(-1, 1)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Through JPEG and back; channels beyond colour stay as they are."""
    colour = 3 if images.shape[1] >= 3 else 1
    bytes_ = ((images[:, :colour] + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    changed = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in bytes_])
    return torch.cat([changed.to(images) / 127.5 - 1, images[:, colour:]], 1)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of this standard deviation in pixels."""
    radius = min(3, *(side - 1 for side in images.shape[-2:]))
    return gaussian_blur(images, [2 * radius + 1] * 2, [deviation] * 2)
