"""Whitened features: an extractor's principal directions, each scaled to the same variance."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memfree.full_precision import full_precision
from memfree.retrieval.features.base import Features, Metric


class Whitened(Features):
    """Features after subtracting a mean and projecting on whitened principal directions.

    On small or uniform data an ImageNet network's raw cosine similarity is high for every pair of
    images (digits: 0.68 in the median). Whitening on images of the same kind (the ``fit`` part of
    a dataset, which is neither trained on nor judged) spreads them out: y = W·(f(x) − m), W of D
    directions divided by their standard deviation, then length 1.

    Args:
        features: the extractor underneath; its ``pooled`` output is used where it has one.
        mean: (D,) m.
        projection: (D, d) transpose of W.
    """

    metric: Metric = "cosine"
    mean: Tensor
    projection: Tensor

    def __init__(self, features: Features, mean: Tensor, projection: Tensor):
        super().__init__()
        self.features = features
        # A projection of pixels is still a picture of them.
        self.reveals_images = features.reveals_images
        self.register_buffer("mean", mean.to(torch.float32))
        self.register_buffer("projection", projection.to(torch.float32))

    @classmethod
    @torch.no_grad()
    def fit(
        cls, features: Features, images: Tensor, components: int = 64, batch_size: int = 256
    ) -> Whitened:
        """Fit mean and directions to images (N, C, H, W) in [-1, 1].

        Args:
            features: the extractor to whiten.
            images: at least 3 images that are neither trained on nor judged.
            components: at most this many directions, of the largest variance; also at most N/3, so
                that their variances are not noise, and only those with a variance to speak of.
            batch_size: images to embed at a time.

        Raises:
            ValueError: there are fewer than 3 images, or they all look the same to the extractor.
        """
        if len(images) < 3:
            raise ValueError(f"whitening needs at least 3 images, not {len(images)}")
        device = features.device or images.device
        raw = torch.cat([_raw(features, part.to(device)) for part in images.split(batch_size)])
        raw = raw.to("cpu", torch.float64)
        mean = raw.mean(0)
        _, spread, directions = torch.linalg.svd(raw - mean, full_matrices=False)
        deviation = spread / (len(raw) - 1) ** 0.5
        keep = min(components, len(raw) // 3, int((deviation > 1e-4 * deviation[0]).sum()))
        if keep < 1 or float(deviation[0]) < 1e-12:
            raise ValueError("whitening needs images that differ, but these have equal features")
        return cls(features, mean, (directions[:keep] / deviation[:keep, None]).T)

    @classmethod
    def from_tensors(cls, features: Features, tensors: dict[str, Tensor]) -> Whitened:
        """Make the extractor again from ``tensors()``.

        Raises:
            ValueError: mean and projection are missing or do not fit together.
        """
        mean, projection = tensors.get("mean"), tensors.get("projection")
        if (
            mean is None
            or projection is None
            or mean.ndim != 1
            or projection.ndim != 2
            or len(mean) != len(projection)
        ):
            raise ValueError("whitened features need tensors mean (D,) and projection (D, d)")
        return cls(features, mean, projection)

    def forward(self, images: Tensor) -> Tensor:
        """Whitened features (B, d) of length 1."""
        with full_precision(images.device):
            return functional.normalize((_raw(self.features, images) - self.mean) @ self.projection)

    def tensors(self) -> dict[str, Tensor]:
        """Mean and projection."""
        return {"mean": self.mean, "projection": self.projection}

    def describe(self) -> dict[str, Any]:
        """The extractor underneath, and a hash of mean and projection."""
        digest = hashlib.sha256()
        for value in (self.mean, self.projection):
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return {
            "name": "whitened",
            "base": self.features.describe(),
            "components": self.projection.shape[1],
            "tensors_sha256": digest.hexdigest(),
            "metric": self.metric,
        }


def _raw(features: Features, images: Tensor) -> Tensor:
    """Features before normalisation where the extractor offers them."""
    pooled = getattr(features, "pooled", features)
    return pooled(images)
