"""Features: what every extractor gives, pixels, networks, and weights read from a file."""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional

from memfree.folders.untrusted import short
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.options import Arithmetic

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


UNREADABLE = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)
"""What libraries raise for a file that holds no weights, or weights of another model."""


def last_line(error: BaseException) -> str:
    """The first line of a message that says something, without code marks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return short(" ".join(lines[:2]) or type(error).__name__, 300)


class NetworkFeatures(Features):
    """A network's embedding of length 1, compared by cosine; differentiable in the images.

    Args:
        network: maps prepared images (B, 3, h, w) to embeddings (B, D); frozen here.
        preprocessing: makes them from images (B, 1 or 3, H, W) in [-1, 1].
        dtype: arithmetic of the network; the embedding is float32 in any case.
    """

    metric: Metric = "cosine"

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing | None, dtype: Arithmetic = "float32"
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.network.to(self.dtype)
        for parameter in self.network.parameters():  # a TorchScript module has no requires_grad_
            parameter.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> NetworkFeatures:
        """Stay in evaluation mode: the statistics of the weights are part of the extractor."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] as the network's input."""
        assert self.preprocessing is not None
        return self.preprocessing(images)

    def run(self, inputs: Tensor) -> Tensor:
        """The network's embedding (B, D) of prepared images, before normalisation."""
        return self.network(inputs)

    def pooled(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) float32, not normalised: for whitening and Fréchet distances."""
        with torch.autocast(images.device.type, enabled=False):
            output = self.run(self.prepare(images).to(self.dtype))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1."""
        return functional.normalize(self.pooled(images), dim=1)

    def _describe(self, name: str, weights_sha256: str, **fields: Any) -> dict[str, Any]:
        assert self.preprocessing is not None
        return {
            "name": name,
            **fields,
            "weights_sha256": weights_sha256,
            "preprocessing": self.preprocessing.describe(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "output": "embedding, L2-normalised",
            "metric": self.metric,
        }


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
