"""Each image embedded once: pooled EfficientNet features, shared by all metrics that need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from memfree.manifest import sha256
from memfree.retrieval.efficientnet import EfficientNetFeatures

MAX_COMPONENTS = 64
"""Principal components kept: 1280 dimensions on some hundred images are singular."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion of the FID network; used where it lies in torch's cache already."""


class Embedder:
    """Pooled EfficientNet-Lite0 features (n, 1280) as float64 numpy arrays."""

    def __init__(self, batch_size: int = 256):
        self.network = EfficientNetFeatures()
        self.batch_size = batch_size

    def __call__(self, images: Tensor) -> np.ndarray:
        """Embed (n, C, H, W) in [-1, 1]."""
        with torch.no_grad():
            parts = [self.network.pooled(part).cpu() for part in images.split(self.batch_size)]
        return torch.cat(parts).double().numpy()

    def describe(self) -> dict:
        """What identifies extractor, preprocessing and weights, for a metric's detail."""
        return self.network.describe()


def fit_components(features: np.ndarray, limit: int = MAX_COMPONENTS, whiten: bool = False) -> PCA:
    """Principal components of fit features, at most ``limit`` and at most a third of the images.

    A component needs several images to have a direction of its own; the third keeps whitening
    from blowing up directions that are noise.

    Args:
        features: (n, D) of the fit part.
        limit: the most components.
        whiten: scale every component to unit variance.

    Raises:
        ValueError: fewer than 6 fit images.
    """
    if len(features) < 6:
        raise ValueError(
            f"the fit part has {len(features)} images, and the embedding needs at least 6; "
            "prepare the data set with a larger fit part"
        )
    components = min(limit, len(features) // 3, features.shape[1])
    return PCA(components, whiten=whiten, svd_solver="full").fit(features)


def flat_pixels(images: Tensor) -> np.ndarray:
    """Images (n, C, H, W) as float64 rows (n, C·H·W)."""
    return images.flatten(1).double().cpu().numpy()


def find_inception_weights() -> Path | None:
    """Where torch-fidelity would look for its Inception weights, if the file is there and whole."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    expected = INCEPTION_FILE.rsplit("-", 1)[1].removesuffix(".pth")
    return path if path.is_file() and sha256(path).startswith(expected) else None


def inception_features(images: Tensor, batch_size: int = 64) -> np.ndarray:
    """The 2048 features of the FID network for (n, C, H, W) in [-1, 1]; weights must be at hand."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).eval()
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    bytes_ = ((colour + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        return torch.cat([network(part) for part in bytes_.split(batch_size)]).double().numpy()
