"""From images to latents and back, by the autoencoder of a text-to-image pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memfree.retrieval.latents import scaling


def latent_shape(vae: Any, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images (3, H, W).

    Raises:
        ValueError: the autoencoder cannot take images of this shape.
    """
    channels, height, width = image_shape
    factor = pixels_per_latent(vae)
    if channels != vae.config.in_channels:
        raise ValueError(
            f"the pipeline's autoencoder takes {vae.config.in_channels} channels, the images have "
            f"{channels}: prepare them with --channels {vae.config.in_channels}"
        )
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be encoded: prepare them with an "
            f"--image_size that {factor} divides"
        )
    return vae.config.latent_channels, height // factor, width // factor


def pixels_per_latent(autoencoder: Any) -> int:
    """How many pixels of height and of width become one latent."""
    config = autoencoder.config
    # Of an AutoencoderTiny, block_out_channels are the decoder's.
    return getattr(config, "upsampling_scaling_factor", 2) ** (len(config.block_out_channels) - 1)


@torch.no_grad()
def posterior(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents of images (B, 3, H, W) in [−1, 1].

    Latents are in the scale in which the denoiser sees them: (z − shift)·scaling_factor.
    """
    distribution = vae.encode(images.to(vae.dtype)).latent_dist
    scale, shift = scaling(vae)
    return (distribution.mean.float() - shift) * scale, distribution.std.float() * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), about in [−1, 1], of scaled latents; differentiable.

    In the arithmetic of the weights, whatever autocast says: Stable Diffusion XL's autoencoder
    overflows in float16, and in bfloat16 images have fewer shades than they are saved with.

    Args:
        vae: an ``AutoencoderKL``, or an ``AutoencoderTiny``, whose latents are never scaled.
        latents: (B, C, h, w).
    """
    scale, shift = scaling(vae)
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0].float()
