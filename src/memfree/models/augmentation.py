"""What copies may look like: random changes of images that a copy detector learns to ignore."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg

from memfree.models.options import AugmentationOptions


def augment(images: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Change each image at random, by its own draws.

    Args:
        images: (B, C, H, W) in [-1, 1], C 1 or 3.
        options: which changes.
        generator: on the images' device.

    Returns:
        as many images in [-1, 1].
    """
    images = _moved(images, options, generator)
    images = _coloured(images, options, generator)
    images = _blurred(images, options, generator)
    images = _through_jpeg(images, options, generator)
    deviation = options.noise * _uniform(images, generator) * _chosen(images, 0.5, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + deviation[:, None, None, None] * noise).clamp(-1, 1)


def _uniform(
    images: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """(B,) uniform numbers."""
    drawn = torch.rand(len(images), generator=generator, device=images.device)
    return low + (high - low) * drawn


def _chosen(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """(B,) 1 with this probability, otherwise 0."""
    return (_uniform(images, generator) < probability).float()


def _moved(images: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Crop, stretch, rotate, mirror and shift in one resampling."""
    area = _uniform(images, generator, options.smallest_crop, 1.0)
    aspect = _uniform(images, generator, math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    right = _uniform(images, generator, -1, 1) * (1 - width)
    down = _uniform(images, generator, -1, 1) * (1 - height)
    right = right + 2 * options.shift * _uniform(images, generator, -1, 1)
    down = down + 2 * options.shift * _uniform(images, generator, -1, 1)
    width = width * (1 - 2 * _chosen(images, options.flip, generator))
    angle = math.radians(options.rotation) * _uniform(images, generator, -1, 1)
    cos, sin = angle.cos(), angle.sin()
    rows = [width * cos, -height * sin, right, width * sin, height * cos, down]
    matrix = torch.stack(rows, 1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _coloured(images: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, and gray."""
    span = options.colour

    def factor() -> Tensor:
        return _uniform(images, generator, 1 - span, 1 + span)[:, None, None, None]

    images = factor() * (images + 1) - 1
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + factor() * (images - mean)
    grayed = images.mean(1, keepdim=True)
    keep = factor() * (1 - _chosen(images, options.gray, generator)[:, None, None, None])
    return (grayed + keep * (images - grayed)).clamp(-1, 1)


def _blurred(images: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Gaussian blur of another width for each image."""
    batch, channels, height, width = images.shape
    largest = options.blur * min(height, width)
    sigma = largest * _uniform(images, generator) * _chosen(images, 0.5, generator)
    radius = min(math.ceil(3 * largest), min(height, width) - 1)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    # A width of zero leaves only the middle of the kernel.
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # (B·C, 1, 2r + 1)
    flat = functional.pad(images, [radius] * 4, mode="replicate").view(
        1, batch * channels, height + 2 * radius, width + 2 * radius
    )
    flat = functional.conv2d(flat, kernel[:, :, None, :], groups=batch * channels)
    flat = functional.conv2d(flat, kernel[:, :, :, None], groups=batch * channels)
    return flat.view(images.shape)


def _through_jpeg(
    images: Tensor, options: AugmentationOptions, generator: torch.Generator
) -> Tensor:
    """Some of the images through JPEG and back, on the CPU."""
    chosen = _chosen(images, options.jpeg, generator).nonzero().flatten().tolist()
    quality = _uniform(images, generator, 20, 90).int().tolist()
    if not chosen:
        return images
    bytes_ = ((images[chosen] + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    changed = [
        decode_jpeg(encode_jpeg(image, quality[number]))
        for image, number in zip(bytes_, chosen, strict=True)
    ]
    images = images.clone()
    images[chosen] = (torch.stack(changed).float() / 127.5 - 1).to(images)
    return images
