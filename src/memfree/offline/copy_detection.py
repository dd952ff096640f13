"""Training of a small copy-detection embedding: augmentations, contrastive loss."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg

from memfree.data.random_streams import step_generator
from memfree.images import from_bytes, to_bytes
from memfree.models.options import AugmentationOptions, CopyDetectionOptions
from memfree.offline.short_training import adamw_with_cosine
from memfree.retrieval.features.copy_detection import CopyDetectionNetwork, CopyDetectionShape
from memfree.retrieval.features.preprocessing import resized


def augment(images: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Change each image (B, 1 or 3, H, W) in [-1, 1] at random; ``generator`` is on its device."""
    for change in (_moved, _coloured, _blurred, _through_jpeg):
        images = change(images, options, generator)
    deviation = options.noise * _uniform(images, generator) * _chosen(images, 0.5, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + deviation[:, None, None, None] * noise).clamp(-1, 1)


def _uniform(
    images: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    drawn = torch.rand(len(images), generator=generator, device=images.device)
    return low + (high - low) * drawn


def _chosen(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """(B,) 1 with this probability, else 0."""
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
    """Gaussian blur, with a width for each image."""
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
    pixels = to_bytes(images[chosen]).cpu()
    changed = [
        decode_jpeg(encode_jpeg(image, quality[number]))
        for image, number in zip(pixels, chosen, strict=True)
    ]
    images = images.clone()
    images[chosen] = from_bytes(torch.stack(changed)).to(images)
    return images


def info_nce(first: Tensor, second: Tensor, temperature: float, group: Tensor) -> Tensor:
    """NT-Xent over two views of each image (Chen et al. 2020; Pizzi et al. 2022, eq. 1), 0-d.

    Mean over the 2B embeddings z_i of −log(exp(z_i·z_p/τ) / Σ_j exp(z_i·z_j/τ)), z_p the other
    view of the same image, j all embeddings except i and other images of i's group. ``first`` and
    ``second`` are (B, D) unit vectors of two views of the same images, ``temperature`` is τ.
    """
    views = torch.cat([first, second])
    count = len(first)
    logits = views @ views.T / temperature
    number = torch.arange(count, device=views.device).repeat(2)
    groups = group.repeat(2)
    own = number[:, None] == number[None, :]
    left_out = (groups[:, None] == groups[None, :]) & ~own
    left_out.fill_diagonal_(True)
    positive = torch.arange(2 * count, device=views.device).roll(count)
    return functional.cross_entropy(logits.masked_fill(left_out, float("-inf")), positive)


def koleo(first: Tensor, second: Tensor, group: Tensor) -> Tensor:
    """Kozachenko–Leonenko estimate of negative entropy (Pizzi et al. 2022, eq. 2), 0-d.

    −mean log ‖z_i − z_j‖ over the 2B embeddings, z_j the nearest of another group: small when all
    directions are used, so that unrelated images are equally far apart everywhere.
    """
    views = torch.cat([first, second])
    groups = group.repeat(2)
    cosine = (views @ views.T).masked_fill(groups[:, None] == groups[None, :], -2)
    nearest = cosine.amax(1)
    # ‖z_i − z_j‖² = 2 − 2 z_i·z_j; the floor bounds the gradient where two nearly agree.
    return -(2 - 2 * nearest).clamp(min=1e-6).log().mean() / 2


class CopyDetectionModule(pl.LightningModule):
    """Trains a network so that changed copies of an image agree and other images spread out.

    Loss of Pizzi et al. (CVPR 2022, arXiv 2202.10261): InfoNCE + λ · KoLeo on normalised
    embeddings of two augmented views. A batch is a dictionary with ``image`` (B, C, H, W) in
    [-1, 1] and ``group`` (B,). A step's random numbers depend only on the seed and its number.
    """

    def __init__(
        self, options: CopyDetectionOptions, shape: CopyDetectionShape, seed: int = 0
    ) -> None:
        super().__init__()
        if options.augmentation.smallest_crop == 0:
            raise ValueError("--model.augmentation.smallest_crop 0: keep more than nothing")
        self.options, self.shape, self.seed = options, shape, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = CopyDetectionNetwork(shape)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of two random views of a batch."""
        return self.loss(batch, step_generator(self.seed, batch_idx, self.device))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """InfoNCE + λ · KoLeo, 0-d; ``generator`` is on the batch's device."""
        images = resized(batch["image"], self.shape.size)
        views = [augment(images, self.options.augmentation, generator) for _ in range(2)]
        embedded = functional.normalize(self.network(torch.cat(views)).float(), dim=1)
        first, second = embedded.chunk(2)
        contrast = info_nce(first, second, self.options.temperature, batch["group"])
        if self.options.entropy_weight == 0:
            return contrast
        return contrast + self.options.entropy_weight * koleo(first, second, batch["group"])

    def configure_optimizers(self) -> Any:
        """AdamW, a short warm-up, then a cosine to 0."""
        return adamw_with_cosine(
            self, float(self.options.learning_rate), float(self.options.weight_decay)
        )
