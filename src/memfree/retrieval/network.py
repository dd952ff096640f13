"""Features of a frozen network: preprocessing, arithmetic, length, and the hash of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memfree.retrieval.features import Features, Metric
from memfree.retrieval.options import Arithmetic
from memfree.retrieval.preprocessing import Preprocessing


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
