"""Embeddings and pixels of images that all quality metrics share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from memfree.folders.manifest import sha256
from memfree.images import to_bytes
from memfree.retrieval import EfficientNetFeatures

MAX_COMPONENTS = 64
"""Principal components kept: 1280 dimensions on some hundred images are singular."""
MAX_PIXELS = 4096
"""Above this many values per image, raw pixels are not kept for the classifiers."""
EMBEDDED_TOGETHER = 32
"""Images in one pass of the network: their activations stay in a CPU's cache, which is three times
faster there than 256 at once."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion of the FID network; used where it lies in torch's cache already."""


@dataclass(frozen=True)
class View:
    """A set of n images as the metrics see it; float32 numpy arrays."""

    pixels: np.ndarray  # (n, ≤ 64): pixels, or their principal components if there are more
    raw: np.ndarray | None  # (n, C·H·W): the pixels; None where an image has more than 4096
    pooled: np.ndarray  # (n, 1280): pooled EfficientNet-Lite0 features
    inception: np.ndarray | None  # (n, 2048); None where the weights are not at hand

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def of(cls, views: list[View], rows: np.ndarray | slice = slice(None)) -> View:
        """Some rows of several views as one."""
        parts: dict[str, Any] = {
            name: None if first is None else np.concatenate([getattr(v, name) for v in views])[rows]
            for name, first in vars(views[0]).items()
        }
        return cls(**parts)

    def take(self, rows: np.ndarray) -> View:
        """The view of some of the images."""
        return View.of([self], rows)

    def classifier_features(self) -> dict[str, np.ndarray]:
        """What a classifier may read, by name."""
        pixels = {} if self.raw is None else {"pixels": self.raw}
        return {**pixels, "efficientnet": self.pooled}


class Viewer:
    """Turns images into views; principal components of pixels are those of the fit images."""

    def __init__(self, fit_images: Tensor, batch_size: int = 256):
        self.batch_size = batch_size
        self.network = EfficientNetFeatures()
        size = fit_images[0].numel()
        self.keeps_raw = size <= MAX_PIXELS
        self.components = None if size <= MAX_COMPONENTS else fit_components(_flat(fit_images))
        self.inception = _inception_network() if find_inception_weights() else None

    def __call__(self, images: Tensor | Iterable[Tensor]) -> View:
        """See images (n, C, H, W) in [-1, 1], or batches of them."""
        batches = images.split(self.batch_size) if isinstance(images, Tensor) else images
        with torch.no_grad():
            views = [self._see(batch) for batch in batches]
        return View.of(views)

    def _see(self, images: Tensor) -> View:
        raw = _flat(images)
        pixels = raw if self.components is None else self.components.transform(raw)
        pooled = [self.network.pooled(part).cpu() for part in images.split(EMBEDDED_TOGETHER)]
        return View(
            pixels=pixels.astype(np.float32),
            raw=raw if self.keeps_raw else None,
            pooled=torch.cat(pooled).numpy(),
            inception=None if self.inception is None else _inception(self.inception, images),
        )

    def describe_pixels(self) -> dict:
        """What the ``pixels`` of a view are, for a metric's detail."""
        what = "pixels" if self.components is None else "principal components of pixels"
        return {"extractor": what}

    def describe_pooled(self) -> dict:
        """What the ``pooled`` features of a view are."""
        described = self.network.describe()
        names = ("name", "preprocessing", "weights", "weights_sha256")
        return {"extractor": {name: described[name] for name in names if name in described}}


def fit_components(features: np.ndarray, limit: int = MAX_COMPONENTS, whiten: bool = False) -> PCA:
    """Principal components of fit features (n, D), at most ``limit`` and at most n/3.

    A component needs several images to have a direction of its own; the third keeps whitening
    from blowing up directions that are noise.
    """
    if len(features) < 6:
        raise ValueError(
            f"the fit part has {len(features)} images, and the embedding needs at least 6; "
            "prepare the dataset with a larger fit part"
        )
    components = min(limit, len(features) // 3, features.shape[1])
    decomposition = PCA(components, whiten=whiten, svd_solver="full")
    return decomposition.fit(features.astype(np.float64))


def _flat(images: Tensor) -> np.ndarray:
    return images.flatten(1).float().cpu().numpy()


def find_inception_weights() -> Path | None:
    """Where torch-fidelity would look for its Inception weights, if the file is there and whole."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    expected = INCEPTION_FILE.rsplit("-", 1)[1].removesuffix(".pth")
    return path if path.is_file() and sha256(path).startswith(expected) else None


def _inception_network() -> torch.nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"]).eval()


def _inception(network: torch.nn.Module, images: Tensor) -> np.ndarray:
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return network(to_bytes(colour)).cpu().numpy()
