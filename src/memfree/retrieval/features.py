"""What an image is compared by: the interface of feature extractors, and plain pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

Metric = Literal["l2", "cosine"]


class Features(nn.Module, ABC):
    """A frozen, differentiable map from images (B, C, H, W) in [-1, 1] to vectors (B, D) float32.

    Attributes:
        metric: how two vectors are compared: ``l2`` (distance) or ``cosine`` (similarity).
        reveals_images: whether images can be had back from their vectors.
    """

    metric: Metric
    reveals_images: bool = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON that identifies the extractor, its preprocessing and its weights."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that an index must store beside ``describe()`` to make the extractor again."""
        return {}

    @property
    def device(self) -> torch.device | None:
        """Where the weights are; None without weights."""
        return next((value.device for value in chain(self.parameters(), self.buffers())), None)

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features (N, D) of many images (N, C, H, W), made in batches without gradients."""
        if len(images) == 0:
            raise ValueError("there are no images to compute features of")
        return torch.cat(list(self._batches(images, batch_size)))

    def _batches(self, images: Tensor, batch_size: int) -> Iterator[Tensor]:
        device = self.device
        for batch in images.split(batch_size):
            yield self(batch if device is None else batch.to(device))


class PixelFeatures(Features):
    """The pixels themselves, C·H·W float32 values in [-1, 1], compared by L2 distance."""

    metric: Metric = "l2"
    reveals_images = True

    def forward(self, images: Tensor) -> Tensor:
        """Flatten images (B, C, H, W) to (B, C·H·W)."""
        return images.flatten(1).to(torch.float32)

    def describe(self) -> dict[str, Any]:
        """Name, preprocessing and metric; pixels have no weights."""
        return {
            "name": "pixels",
            "preprocessing": "float32 in [-1, 1], channels first, flattened",
            "weights": None,
            "metric": self.metric,
        }


def identity(description: dict[str, Any]) -> dict[str, Any]:
    """What of a description says whether vectors can be compared: all but where its files are."""
    kept = {name: value for name, value in description.items() if name != "path"}
    if isinstance(kept.get("base"), dict):
        kept["base"] = identity(kept["base"])
    return kept
