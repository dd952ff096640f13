"""Distance of samples to held-out images: Fréchet distance and KID at equal counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from memfree.evaluation.intervals import Interval, conditions_detail
from memfree.evaluation.manifold import drawn_conditions, drawn_rows
from memfree.evaluation.metrics import HELDOUT, Metric, metric
from memfree.evaluation.subsampling import DRAWS, Subsampled, subsample

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
    draws: int = DRAWS,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail,
) -> list[Metric]:
    """Fréchet distance of every subject to the test images, and of training images: the floor.

    The distance falls with the number of images, so all sides have the same: n, the smallest
    count. The value is the mean over ``SUBSETS`` random subsets of n; the interval is what other
    samples, as many and against the same test images, would give (``subsampling``).

    Args:
        space: name of the features; the metric is ``frechet_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images.
        seed: of the subsets; the same rows are drawn from all subjects of one count.
        paired: subject to its reference, for differences; both have the same noise.
        draws: subsets for the interval; 0 takes the first n once and gives no interval.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    target = drawn_rows(target, n, seed)
    distance = FrechetDistance(target)
    detail = {"equal_count": n, "dimensions": int(target.shape[1]), **detail}
    values = {name: _values(distance, each, n, seed, draws) for name, each in everyone.items()}
    spread = {
        name: subsample(
            len(each), partial(_of_rows, distance, each), seed, (conditions or {}).get(name), draws
        )
        for name, each in everyone.items()
    }
    metrics = []
    for name in everyone:
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        interval = _interval(values[name], spread[name], at_least=0.0)
        over = conditions_detail((conditions or {}).get(name)) if draws else {}
        metrics.append(metric(f"frechet_{space}", name, interval, n, **over, **detail, **notes))
    for name, reference in (paired or {}).items():
        difference = values[name] - values[reference]
        interval = _interval(difference, spread[name] - spread[reference])
        metrics.append(
            metric(f"frechet_{space}_difference", name, interval, n, reference=reference, **detail)
        )
    return metrics


def _values(
    distance: FrechetDistance, features: np.ndarray, n: int, seed: int, draws: int
) -> np.ndarray:
    """Distances of random subsets of n, without repetition."""
    if draws == 0:
        return np.array([distance(features[:n])])
    count = len(features)
    generator = np.random.default_rng([seed, 1])
    subsets = [generator.permutation(count)[:n] for _ in range(SUBSETS if count > n else 1)]
    return np.array([distance(features[rows]) for rows in subsets])


def _of_rows(distance: FrechetDistance, features: np.ndarray, rows: np.ndarray) -> float:
    return distance(features[rows])


def _interval(values: np.ndarray, spread: Subsampled, at_least: float | None = None) -> Interval:
    """Of the mean over subsets: the spread of the whole set, and that of the choice of subsets."""
    chosen = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    return spread.interval(float(values.mean()), chosen, at_least)


def kid_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    subsets: int = 50,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail,
) -> list[Metric]:
    """Kernel inception distance (unbiased, cubic kernel) of every subject and of the floor.

    All sides have the same count n, the smallest. The value is the mean over subsets of n/2, as
    published; the interval is what other samples, as many and against the same test images, would
    give (``subsampling``).

    Args:
        space: name of the features; the metric is ``kid_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images.
        seed: of the subsets.
        subsets: how many.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    target = drawn_rows(target, n, seed)
    metrics = []
    for name, features in everyone.items():
        drawn = drawn_rows(features, n, seed)
        mean, deviation = _kid(drawn, target, max(2, n // 2), subsets, seed)
        shared = drawn_conditions((conditions or {}).get(name), n, seed)
        pairs = pair_terms(drawn, target)
        spread = subsample(n, partial(mean_of_pairs, pairs), seed, shared)
        interval = spread.interval(mean, deviation**2 / subsets)
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        metrics.append(
            metric(
                f"kid_{space}",
                name,
                interval,
                n,
                subset=max(2, n // 2),
                **conditions_detail(shared),
                **detail,
                **notes,
            )
        )
    return metrics


def pair_terms(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """h(x, x') = k(x, x') − g(x) − g(x'), with g the mean kernel to the target; (n, n) float32.

    The mean of h over pairs of different samples is KID, but for a term of the target alone. The
    diagonal is 0.
    """
    dimensions = features.shape[1]
    samples, others = features.astype(np.float64), target.astype(np.float64)
    to_target = ((samples @ others.T / dimensions + 1) ** 3).mean(1)
    terms = (samples @ samples.T / dimensions + 1) ** 3 - to_target[:, None] - to_target
    np.fill_diagonal(terms, 0.0)
    return terms.astype(np.float32)


def mean_of_pairs(terms: np.ndarray, rows: np.ndarray) -> float:
    """Mean of ``pair_terms`` over the pairs of different ``rows``."""
    chosen = np.zeros(len(terms), np.float32)
    chosen[rows] = 1
    return float(chosen @ (terms @ chosen)) / (len(rows) * (len(rows) - 1))


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
