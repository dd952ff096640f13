"""Distance of samples to held-out images: Fréchet distance and KID at equal counts."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from memfree.evaluation.intervals import Interval, centred
from memfree.evaluation.manifold import drawn_rows
from memfree.evaluation.metrics import HELDOUT, Metric, metric

SUBSETS = 20
"""Subsets without repetition whose mean is a Fréchet distance at a count below the samples'."""


class _Embedded(nn.Module):
    """Lets torchmetrics take features that are computed already in place of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Fréchet distance of Gaussians fitted to features, to one target; float64 (torchmetrics).

    Args:
        target: (m, D) features of the images to be like.
    """

    def __init__(self, target: np.ndarray):
        embedded = _Embedded(target.shape[1])
        distance = FrechetInceptionDistance(embedded, reset_real_features=False)
        self._distance = distance.set_dtype(torch.float64)
        self._distance.update(torch.from_numpy(target), real=True)

    def __call__(self, features: np.ndarray) -> float:
        """Distance of (n, D) features to the target."""
        self._distance.reset()
        self._distance.update(torch.from_numpy(features), real=False)
        return float(self._distance.compute())


def frechet_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    paired: dict[str, str] | None = None,
    draws: int = 100,
    **detail,
) -> list[Metric]:
    """Fréchet distance of every subject to the test images, and of training images: the floor.

    The distance falls with the number of images, so all sides have the same: n, the smallest
    count. The value is the mean over ``SUBSETS`` random subsets of n; the interval is what other
    samples of size n would give: n resampled with repetition, centred on the value, because
    repetitions alone raise the distance.

    Args:
        space: name of the features; the metric is ``frechet_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images.
        seed: of the subsets; the same rows are drawn from all subjects of one count.
        paired: subject to its reference, for differences; both have the same noise.
        draws: resamplings; 0 takes the first n once and gives no interval.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    target = drawn_rows(target, n, seed)
    distance = FrechetDistance(target)
    detail = {"equal_count": n, "dimensions": int(target.shape[1]), **detail}
    results = {name: _draw(distance, each, n, seed, draws) for name, each in everyone.items()}
    metrics = []
    for name, (values, resampled) in results.items():
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        interval = centred(float(values.mean()), resampled)
        metrics.append(metric(f"frechet_{space}", name, interval, n, **detail, **notes))
    for name, reference in (paired or {}).items():
        (own, own_draws), (other, other_draws) = results[name], results[reference]
        interval = centred(float(own.mean() - other.mean()), own_draws - other_draws)
        metrics.append(
            metric(f"frechet_{space}_difference", name, interval, n, reference=reference, **detail)
        )
    return metrics


def _draw(
    distance: FrechetDistance, features: np.ndarray, n: int, seed: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of subsets of n without repetition, and of resamplings of n with repetition."""
    if draws == 0:
        return np.array([distance(features[:n])]), np.array([])
    count = len(features)
    generator = np.random.default_rng([seed, 1])
    subsets = [generator.permutation(count)[:n] for _ in range(SUBSETS if count > n else 1)]
    generator = np.random.default_rng([seed, 2])
    resamplings = [generator.integers(0, count, n) for _ in range(draws)]
    return (
        np.array([distance(features[rows]) for rows in subsets]),
        np.array([distance(features[rows]) for rows in resamplings]),
    )


def kid_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    subsets: int = 50,
    **detail,
) -> list[Metric]:
    """Kernel inception distance (unbiased, cubic kernel) of every subject and of the floor.

    All sides have the same count n, the smallest. The interval is 1.96 standard deviations over
    subsets of n/2: their spread about the whole is that of the whole about the truth (delete-half
    jackknife).

    Args:
        space: name of the features; the metric is ``kid_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images.
        seed: of the subsets.
        subsets: how many.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    target = drawn_rows(target, n, seed)
    metrics = []
    for name, features in everyone.items():
        mean, deviation = _kid(drawn_rows(features, n, seed), target, max(2, n // 2), subsets, seed)
        interval = Interval(mean, mean - 1.96 * deviation, mean + 1.96 * deviation)
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        metrics.append(
            metric(f"kid_{space}", name, interval, n, subset=max(2, n // 2), **detail, **notes)
        )
    return metrics


def _kid(
    features: np.ndarray, target: np.ndarray, size: int, subsets: int, seed: int
) -> tuple[float, float]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # torchmetrics warns that it keeps all features, which is a few megabytes here, and
        # draws its subsets from torch's global generator.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        kid = KernelInceptionDistance(
            _Embedded(features.shape[1]), subsets=subsets, subset_size=size
        )
        kid.update(torch.from_numpy(target), real=True)
        kid.update(torch.from_numpy(features), real=False)
        mean, deviation = kid.compute()
    return float(mean), float(deviation)
