"""Feature extractors: the interface, pixels, networks, and whitening of another extractor."""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional

from memfree.folders.untrusted import short
from memfree.full_precision import full_precision
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.options import Arithmetic

Metric = Literal["l2", "cosine"]


class Features(nn.Module, ABC):
    """A frozen, differentiable map from images (B, C, H, W) in [-1, 1] to vectors (B, D) float32,
    compared by ``metric``. ``reveals_images``: images can be reconstructed from vectors."""

    metric: Metric
    reveals_images: bool = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON values that identify the extractor, its preprocessing and its weights."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that an index stores beside ``describe()`` to rebuild the extractor."""
        return {}

    @property
    def device(self) -> torch.device | None:
        """Where the weights are; None without weights."""
        return next((value.device for value in chain(self.parameters(), self.buffers())), None)

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features (N, D) of many images (N, C, H, W), in batches without gradients."""
        if len(images) == 0:
            raise ValueError("there are no images to compute features of")
        device = self.device or images.device
        return torch.cat([self(batch.to(device)) for batch in images.split(batch_size)])


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
    """The description without file paths: equal ones have comparable vectors."""
    kept = {name: value for name, value in description.items() if name != "path"}
    if isinstance(kept.get("base"), dict):
        kept["base"] = identity(kept["base"])
    return kept


UNREADABLE: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)
"""What libraries raise for a file without weights, or with another model's."""


@contextmanager
def unreadable(message: str, *further: type[Exception]) -> Iterator[None]:
    """Turn ``UNREADABLE`` and further errors into a one-line ValueError: message and reason."""
    try:
        yield
    except (*UNREADABLE, *further) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = short(" ".join(lines[:2]) or type(error).__name__, 300)
        raise ValueError(f"{message}: {reason}") from error


class NetworkFeatures(Features):
    """A frozen network's embedding of length 1, compared by cosine; differentiable in the images.
    It maps prepared images (B, 3, h, w) to (B, D), in ``dtype`` arithmetic but float32 vectors."""

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
        """Stay in evaluation mode: the weights' statistics are part of the extractor."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn images (B, 1 or 3, H, W) in [-1, 1] into the network's input."""
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


class Whitened(Features):
    """Features minus a mean, projected on whitened principal directions.

    On small or uniform data an ImageNet network's raw cosine similarity is high for every pair
    (digits: 0.68 in the median). Whitening on images of the same kind (a dataset's ``fit`` part,
    neither trained on nor judged) spreads them out: y = W·(f(x) − m), with W of D directions
    divided by their standard deviation, then scaled to length 1. f is the extractor's ``pooled``
    output if it has one; ``projection`` (D, d) is Wᵀ.
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
            images: at least 3, neither trained on nor judged, and not all alike to the extractor.
            components: upper limit on directions, largest variance first; also at most N/3, so that
                variances are not noise, and none of negligible variance.
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
        """Rebuild the extractor from ``tensors()``; ValueError if they do not fit together."""
        mean, projection = tensors.get("mean"), tensors.get("projection")
        if (
            mean is None
            or projection is None
            or projection.ndim != 2
            or mean.shape != projection.shape[:1]
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
        """The inner extractor, and a hash of mean and projection."""
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
    return getattr(features, "pooled", features)(images)
