"""What a reference index says of a set of images: nearest image, similarity, p-value, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from memfree.guidance import Calibration, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Neighbours:
    """Per image, what the index found; numpy arrays of equal length n."""

    sigma: np.ndarray
    """(n,) float64: σ of the similarity measure, higher is nearer; −nL2 for ``NormalizedL2``."""
    row: np.ndarray
    """(n,) int64: row of the nearest reference."""
    multiplicity: np.ndarray
    """(n,) int64: records of the nearest reference's whole group in the training set."""
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
    """Measure every image against the index.

    Args:
        index: the reference images, deduplicated.
        similarity: a measure of ``memfree.guidance``, the one that ``calibration`` is of.
        calibration: held-out similarities, of the same index.
        images: (n, C, H, W) in [-1, 1].
        false_positive_rate: the verdict's, within what the calibration can give.
        batch_size: images at a time.

    Raises:
        ValueError: no images, or images of another shape than the index's.
    """
    if len(images) == 0:
        raise ValueError("there are no images to measure")
    shape = tuple(images.shape[1:])
    if shape != tuple(index.image_shape):
        raise ValueError(f"images are {shape}, the index holds {tuple(index.image_shape)}")
    sigmas, rows, ratios = [], [], []
    with torch.no_grad():
        for batch in images.to(index.device).split(batch_size):
            match = similarity(index, batch)
            hits = index.search(match.vectors, 2)
            sigmas.append(match.sigma.double().cpu())
            rows.append(match.rows[:, 0].cpu())
            ratios.append(distance_ratio(hits.scores.double().cpu(), index.metric))
    sigma, row = torch.cat(sigmas), torch.cat(rows)
    threshold = calibration.threshold(false_positive_rate)
    return Neighbours(
        sigma=sigma.numpy(),
        row=row.numpy(),
        multiplicity=index.group_multiplicity.cpu()[row].numpy(),
        distance_ratio=torch.cat(ratios).numpy(),
        p_value=calibration.p_values(sigma).double().cpu().numpy(),
        copy=(sigma > threshold).numpy(),
    )


def distance_ratio(scores: Tensor, metric: str) -> Tensor:
    """d_1/d_2 from the two best scores of each query (Gu et al.: memorized below 1/3).

    Cosine similarities are turned into distances of unit vectors, √(2 − 2s). Where both
    distances are 0, two groups hold the same image, and the ratio is 1.

    Args:
        scores: (n, 2), best first.
        metric: ``l2`` (distances) or ``cosine`` (similarities).
    """
    distances = scores if metric == "l2" else (2 - 2 * scores).clamp_min(0).sqrt()
    nearest, second = distances[:, 0], distances[:, 1]
    return torch.where(second > 0, nearest / second.clamp_min(1e-300), torch.ones_like(nearest))
