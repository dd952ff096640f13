"""Small copy-detection network, trained on a dataset's own images: network and features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from memfree.folders.manifest import read_manifest, sha256
from memfree.retrieval.features.base import NetworkFeatures, state_hash, unreadable
from memfree.retrieval.features.preprocessing import resized

WEIGHTS = "copy_detection.safetensors"
_GROUPS = 8
_LARGEST = 4096  # number in a description, so that a damaged one allocates no memory


@dataclass(frozen=True)
class CopyDetectionShape:
    """Size of the network."""

    channels: int = 3
    """Image channels: 1 or 3."""
    size: int = 32
    """Height and width in pixels to which images are resized (bilinear, antialiased)."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each resolution: half the size, a quarter, ..."""
    dimension: int = 128
    """Length of the embedding."""

    @classmethod
    def from_json(cls, value: Any) -> CopyDetectionShape:
        """Read what ``to_json`` wrote; ValueError if it is not that, or absurdly large."""
        try:
            widths = tuple(value["widths"])
            shape = cls(value["channels"], value["size"], widths, value["dimension"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a copy-detection network lacks {error}") from error
        numbers = (shape.channels, shape.size, shape.dimension, *widths)
        if not all(isinstance(number, int) and 0 < number <= _LARGEST for number in numbers) or (
            not 0 < len(widths) <= 8 or any(width % _GROUPS for width in widths)
        ):
            raise ValueError(f"no copy-detection network has the shape {value}")
        return shape

    def to_json(self) -> dict[str, Any]:
        """The numbers, as stored in a manifest."""
        return {**asdict(self), "widths": list(self.widths)}


class CopyDetectionNetwork(nn.Module):
    """A small residual network with smooth layers: group norm, SiLU, average and GeM pooling. Group
    norm treats images alone, so training and use agree; strides are averages, so pixel gradients
    have no checkerboard."""

    def __init__(self, shape: CopyDetectionShape) -> None:
        super().__init__()
        widths = shape.widths
        self.stem = nn.Conv2d(shape.channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            _Block(before, width)
            for before, width in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.norm = nn.GroupNorm(_GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], shape.dimension)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of images (B, C, size, size) in [-1, 1]."""
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = block(functional.avg_pool2d(hidden, 2))
        # Generalised mean, p = 3, as SSCD pools; the floor keeps the root differentiable.
        active = functional.silu(self.norm(hidden)).clamp(min=1e-3)
        return self.head(active.pow(3).mean((2, 3)).pow(1 / 3))


class _Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (nn.GroupNorm(_GROUPS, n) for n in (before, width))
        self.first = nn.Conv2d(before, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(functional.silu(self.first_norm(hidden)))
        inner = self.second(functional.silu(self.second_norm(inner)))
        return self.skip(hidden) + inner


class CopyDetectionFeatures(NetworkFeatures):
    """Embedding of a copy-detection network, of length 1, compared by cosine. Trained with SSCD's
    recipe (Pizzi et al., CVPR 2022). An index holds the weights and does not need ``path``."""

    def __init__(
        self, shape: CopyDetectionShape, weights: dict[str, Tensor], path: Path | None = None
    ) -> None:
        with torch.device("meta"):  # no memory before the weights are checked
            network = CopyDetectionNetwork(shape)
        try:
            own = {name: value.clone() for name, value in weights.items()}
            network.load_state_dict(own, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                "the weights of a copy-detection network do not fit its shape: copy its folder "
                "whole, or build the index again"
            ) from error
        super().__init__(network, None)
        self.shape = shape
        self.path = path
        self.weights_sha256 = state_hash(network)

    @classmethod
    def load(cls, folder: Path) -> CopyDetectionFeatures:
        """Open the folder that ``memfree train-embedding`` wrote."""
        manifest = read_manifest(folder, "embedding")
        shape = CopyDetectionShape.from_json(manifest.get("shape"))
        path = folder / WEIGHTS
        if not path.is_file() or sha256(path) != manifest.get("file_sha256"):
            raise ValueError(f"{path} is not the file that manifest.json describes; train it again")
        with unreadable(f"{path} cannot be read"):
            weights = safetensors.torch.load_file(path)
        return cls(shape, weights, folder.absolute())

    @classmethod
    def from_description(
        cls, description: dict[str, Any], tensors: dict[str, Tensor]
    ) -> CopyDetectionFeatures:
        """Rebuild the extractor from ``describe()`` and ``tensors()`` or the folder."""
        path = None if description["path"] is None else Path(description["path"])
        if not tensors and path is not None:
            return cls.load(path)
        return cls(CopyDetectionShape.from_json(description["shape"]), tensors, path)

    def prepare(self, images: Tensor) -> Tensor:
        """Resize images (B, 1 or 3, H, W) in [-1, 1] to input (B, C, size, size)."""
        wanted, given = self.shape.channels, images.shape[1]
        if given != wanted and (given, wanted) != (1, 3):
            raise ValueError(
                f"the copy-detection embedding was trained on images of {wanted} channels, "
                f"not {given}"
            )
        return resized(images.to(torch.float32).expand(-1, wanted, -1, -1), self.shape.size)

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return dict(self.network.state_dict())

    def describe(self) -> dict[str, Any]:
        """Name, shape, preprocessing, weights' hash and metric."""
        return {
            "name": "copy-detection",
            "path": None if self.path is None else str(self.path),
            "shape": self.shape.to_json(),
            "preprocessing": f"{self.shape.size}x{self.shape.size} bilinear antialiased, [-1, 1]",
            "weights_sha256": self.weights_sha256,
            "output": "GeM pooling (p = 3), linear, L2-normalised",
            "metric": self.metric,
        }
