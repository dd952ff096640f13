"""Nearest training images of every sample, by the guiding similarity and by a second one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memfree.evaluation.embedding import View, fit_components
from memfree.evaluation.intervals import conditions_detail, rate_interval
from memfree.evaluation.metrics import Metric, metric
from memfree.guidance import Calibration, Match, Similarity, default_similarity, measure
from memfree.guidance.calibration import Judge, nearest
from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Neighbours:
    """Per image, what the index found; numpy arrays of equal length n."""

    sigma: np.ndarray
    """(n,) float64: σ of the similarity, higher is nearer; −nL2 for ``NormalizedL2``."""
    row: np.ndarray
    """(n,) int64: row of the nearest reference."""
    multiplicity: np.ndarray
    """(n,) int64: copies of the nearest reference's whole group in the training set."""
    distance_ratio: np.ndarray
    """(n,) float64: d_1/d_2, the distance to the nearest over that to the second nearest group."""
    p_value: np.ndarray
    """(n,) float64: (1 + calibration images at least as similar) / (calibration images + 1)."""
    copy: np.ndarray
    """(n,) bool: σ is above the calibrated threshold."""

    def __len__(self) -> int:
        return len(self.sigma)


def find_neighbours(
    index: ReferenceIndex,
    similarity: Similarity,
    calibration: Calibration,
    images: Tensor,
    false_positive_rate: float,
    batch_size: int = 256,
) -> Neighbours:
    """Measure images (n, C, H, W) in [-1, 1] against a deduplicated index and its calibration.

    Raises:
        ValueError: no images, or images of another shape than the index's.
    """
    if len(images) == 0:
        raise ValueError("there are no images to measure")
    shape = tuple(images.shape[1:])
    if shape != tuple(index.image_shape):
        raise ValueError(f"images are {shape}, the index holds {tuple(index.image_shape)}")
    ratios = []

    def keep_ratio(match: Match) -> None:
        scores = index.search(match.vectors, 2).scores
        ratios.append(distance_ratio(scores.double().cpu(), index.metric))

    judge = Judge(index, similarity, calibration, false_positive_rate)
    sigma, row, p_value, copy = judge(images, batch_size, keep_ratio)
    return Neighbours(
        sigma=sigma.numpy(),
        row=row.numpy(),
        multiplicity=index.group_multiplicity.cpu()[row].numpy(),
        distance_ratio=torch.cat(ratios).numpy(),
        p_value=p_value.numpy(),
        copy=copy.numpy(),
    )


def distance_ratio(scores: Tensor, metric: str) -> Tensor:
    """d_1/d_2 from the two best scores (n, 2) of each query (Gu et al.: memorized below 1/3).

    Cosine similarities become distances of unit vectors, √(2 − 2s). Where both distances are 0,
    two groups hold the same image, and the ratio is 1.
    """
    distances = scores if metric == "l2" else (2 - 2 * scores).clamp_min(0).sqrt()
    nearest, second = distances[:, 0], distances[:, 1]
    return torch.where(second > 0, nearest / second.clamp_min(1e-300), torch.ones_like(nearest))


class WhitenedSimilarity:
    """Cosine of whitened EfficientNet-Lite0 features to the nearest training image.

    Raw features of small images are all alike (cosines near 1), so they are whitened on the fit
    part: every principal direction gets the same variance.

    Args:
        fit: view of the fit part.
        train: view of the distinct training images.
        calibration: view of the calibration part.
        extractor: what identifies the embedding.
    """

    def __init__(self, fit: View, train: View, calibration: View, extractor: dict[str, Any]):
        self.components = fit_components(fit.pooled, whiten=True)
        self.references = self._unit(train)  # (rows, d) float64
        sigmas = torch.from_numpy(self._best(calibration)).float()
        self.calibration = Calibration("whitened-efficientnet", sigmas.sort().values)
        components = int(self.components.n_components_)
        self.describe: dict[str, Any] = {"extractor": extractor, "components": components}

    def sigma(self, images: Tensor, view: View) -> np.ndarray:
        """Cosine to the nearest training image, (n,)."""
        return self._best(view)

    def _best(self, view: View, chunk: int = 1024) -> np.ndarray:
        parts = [(part @ self.references.T).amax(1) for part in self._unit(view).split(chunk)]
        return torch.cat(parts).numpy()

    def _unit(self, view: View) -> Tensor:
        whitened = torch.from_numpy(self.components.transform(view.pooled.astype(np.float64)))
        return torch.nn.functional.normalize(whitened, dim=1)


class IndexSimilarity:
    """The default similarity of another index of the training images.

    Of pixels (nL2) where the first measure is an embedding already, or of another embedding.
    Calibration images are (n, C, H, W) in [-1, 1].
    """

    def __init__(self, index: ReferenceIndex, calibration_images: Tensor):
        self.index = index
        self.similarity = default_similarity(index)
        measured = measure(index, self.similarity, calibration_images)
        described = index.features.describe()
        name, digest = described["name"], described.get("weights_sha256")
        if digest is None:
            self.calibration = measured
            self.describe: dict[str, Any] = {"extractor": name}
        else:
            self.calibration = Calibration(f"{name}-{measured.similarity}", measured.sigmas)
            self.describe = {"extractor": {"name": name, "weights_sha256": digest}}

    def sigma(self, images: Tensor, view: View) -> np.ndarray:
        """σ to the nearest training images, (n,)."""
        return nearest(self.index, self.similarity, images)[0].double().numpy()


SecondSimilarity = WhitenedSimilarity | IndexSimilarity
"""σ of images (n, C, H, W) and their view by what no guidance sees, with thresholds of its own.

Judged by the measure that it optimises, a guidance can push samples just past the line.
"""


def second_copies(
    second: SecondSimilarity, sigma: np.ndarray, false_positive_rate: float
) -> np.ndarray:
    """(n,) bool: above the second similarity's own threshold of this false-positive rate."""
    # float32, as the calibration is: the same image must not compare differently with itself
    return sigma.astype(np.float32) > second.calibration.threshold(false_positive_rate)


def second_metric(
    second: SecondSimilarity,
    subject: str,
    flags: np.ndarray,
    false_positive_rate: float,
    conditions: np.ndarray | None = None,
) -> Metric:
    """The rate ``second_copies`` of one subject; ``conditions`` are of ``shared_conditions``."""
    return metric(
        "second_copies",
        subject,
        rate_interval(flags, conditions),
        len(flags),
        similarity=second.calibration.similarity,
        threshold=second.calibration.threshold(false_positive_rate),
        false_positive_rate=false_positive_rate,
        false_positive_rate_limits=[*second.calibration.rate_limits(false_positive_rate)],
        **conditions_detail(conditions),
        **second.describe,
    )
