"""What the measures can see: training images changed on purpose, and how many are called copies."""

from __future__ import annotations

import torch
from torch import Tensor

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
    }
