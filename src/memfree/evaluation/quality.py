"""Quality and diversity: Fréchet and kernel distances, precision, recall, Vendi score.

Metrics depend on the number of images, so all sides have the same: n, the smallest count. Functions
``…_metrics`` take the name of the features, ``space``; features (count, D) by subject; those of the
distinct training images, ``floor``, reported for ``heldout``; those of the test images, ``target``;
a ``seed`` for the rows that are drawn; ``conditions`` by subject, of ``shared_conditions``; and
further ``detail`` to write beside the numbers. Intervals are what other samples, as many and
against the same test images, would give (``subsample``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from memfree.data.random_streams import EvaluationStream, generator_of
from memfree.evaluation.embedding import View, fit_components
from memfree.evaluation.inputs import Inputs, Second, Subject
from memfree.evaluation.intervals import (
    Interval,
    conditions_detail,
    effective_conditions,
    shared_conditions,
    student_quantile,
)
from memfree.evaluation.metrics import HELDOUT, Metric, metric, rate_metric

Conditions: TypeAlias = Mapping[str, np.ndarray | None] | None
DRAWS = 100
"""Subsets of either size."""
MIN_UNITS = 8
"""Images, or conditions, below which there is no interval: a quarter would be one of them."""


@dataclass(frozen=True)
class Subsampled:
    """A statistic of random subsets of n units, of images or of whole conditions."""

    half: np.ndarray
    """(draws,) of subsets of ⌊n/2⌋ units; empty where there are too few units."""
    quarter: np.ndarray
    """(draws,) of subsets of ⌊n/4⌋ units."""
    units: int
    """n."""
    effective: float
    """n, or the effective number of conditions of unequal size."""

    def __sub__(self, other: Subsampled) -> Subsampled:
        half, quarter = self.half - other.half, self.quarter - other.quarter
        return Subsampled(half, quarter, self.units, self.effective)

    def interval(
        self, value: float, further: float = 0.0, at_least: float | None = None
    ) -> Interval:
        """Student's interval of ``value``, the statistic of the whole set.

        Args:
            value: of the whole set.
            further: variance from elsewhere, as of a mean over random subsets.
            at_least: smallest value that is possible.
        """
        if not len(self.half):
            return Interval(value)
        half = student_quantile(self.effective) * sqrt(self.variance_of_whole() + further)
        low = value - half if at_least is None else max(at_least, value - half)
        return Interval(value, low, value + half)

    def variance_of_whole(self) -> float:
        """Variance of the statistic of all n units over other sets of as many.

        A statistic with a linear and a quadratic part has variance a/m + b/m² over sets of m, and
        a·(1/m − 1/n) + b·(1/m² − 1/n²) over subsets of m out of n, as the mean of a subset has a
        finite population correction. Two sizes give a and b, neither below 0. The result is
        uncertain, and below the variance by halves alone (b = 0) where chance has it: what is
        returned is the geometric mean of both, with two thirds of the weight for that by halves.
        """
        n = self.units
        sizes = np.array([n // 2, n // 4], dtype=float)
        system = np.stack([1 / sizes - 1 / n, 1 / sizes**2 - 1 / n**2], 1)
        seen = np.array([self.half.var(ddof=1), self.quarter.var(ddof=1)])
        by_halves = float(seen[0] / system[0, 0]) / n
        linear, quadratic = np.linalg.solve(system, seen)
        if quadratic < 0:
            return by_halves
        if linear < 0:
            linear, quadratic = 0.0, seen[0] / system[0, 1]
        return (by_halves**2 * float(linear / n + quadratic / n**2)) ** (1 / 3)


def subsample(
    n: int,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    clusters: np.ndarray | None = None,
    draws: int = DRAWS,
) -> Subsampled:
    """Values of a statistic on random halves and quarters of ``n`` images.

    Args:
        n: images.
        statistic: takes different row numbers int64 and returns a number.
        seed: for the subsets; equal seeds, counts and clusters give equal subsets.
        clusters: (n,) of ``shared_conditions``: subsets are of whole conditions; None for
            independent images.
        draws: subsets of either size; 0 for no interval.
    """
    codes = np.arange(n) if clusters is None else clusters
    units = int(codes.max()) + 1
    effective = float(n) if clusters is None else effective_conditions(clusters)
    if units < MIN_UNITS:
        draws = 0
    generator = generator_of(seed, EvaluationStream.SUBSAMPLES)

    def values(size: int) -> np.ndarray:
        results = []
        for _ in range(draws):
            chosen = np.zeros(units, dtype=bool)
            chosen[generator.permutation(units)[:size]] = True
            results.append(statistic(np.flatnonzero(chosen[codes])))
        return np.array(results)

    return Subsampled(values(units // 2), values(units // 4), units, effective)


def drawn_rows(features: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, the same for all features of one count."""
    generator = generator_of(seed, EvaluationStream.ROWS)
    return features[np.sort(generator.permutation(len(features))[:n])]


def _drawn(
    name: str, features: np.ndarray, n: int, seed: int, conditions: Conditions
) -> tuple[np.ndarray, np.ndarray | None]:
    """n of a subject's rows, and their conditions."""
    shared = (conditions or {}).get(name)
    if shared is not None:
        shared = shared_conditions(drawn_rows(shared, n, seed))
    return drawn_rows(features, n, seed), shared


def _on_rows(
    measure: Callable[[np.ndarray], float], features: np.ndarray
) -> Callable[[np.ndarray], float]:
    return lambda rows: measure(features[rows])


def _smallest(*sides: np.ndarray) -> int:
    return min(len(features) for features in sides)


def _notes(name: str) -> dict[str, str]:
    return {"compared": "distinct training images"} if name == HELDOUT else {}


NEIGHBOURS = 3
"""k of Kynkäänniemi et al.: a point's ball reaches to its k-th nearest neighbour."""
_BLOCK = 1024


def on_manifold(points: np.ndarray, features: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Which points lie in the ball of some feature (Kynkäänniemi et al. 2019, eq. 1), (n,) bool.

    A ball's radius is the distance to the k-th nearest of the other features.

    Args:
        points: (n, D).
        features: (m, D), m > k; they span the manifold.
        k: neighbours.

    Raises:
        ValueError: there are too few features.
    """
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images, not {len(features)}")

    def in_blocks(rows: np.ndarray, reduce: Callable[[np.ndarray], Any]) -> np.ndarray:
        starts = range(0, len(rows), _BLOCK)
        return np.concatenate([reduce(cdist(rows[i : i + _BLOCK], features)) for i in starts])

    radius = in_blocks(features, lambda distances: np.partition(distances, k, axis=1)[:, k])
    return in_blocks(points, lambda distances: (distances <= radius).any(1))


def manifold_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    conditions: Conditions = None,
    **detail: Any,
) -> list[Metric]:
    """Precision (samples among real images) and recall (real images among samples) of subjects.

    Intervals are those of rates, of precision over the samples and of recall over the test images,
    with the manifolds held fixed. None below four images.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = _smallest(target, *everyone.values())
    if n <= NEIGHBOURS:
        return []
    target = drawn_rows(target, n, seed)
    sizes = {"equal_count": n, "neighbours": NEIGHBOURS, "dimensions": int(target.shape[1])}
    metrics = []
    for name, features in everyone.items():
        features, shared = _drawn(name, features, n, seed, conditions)
        for measured, inside, over in (
            ("precision", on_manifold(features, target), shared),
            ("recall", on_manifold(target, features), None),
        ):
            notes = {**sizes, **conditions_detail(over), **detail, **_notes(name)}
            metrics.append(rate_metric(f"{measured}_{space}", name, inside, over, **notes))
    return metrics


SUBSETS = 20
"""Subsets without repetition whose mean is a Fréchet distance at a count below the samples'."""


class _Embedded(nn.Identity):
    """Lets torchmetrics take features that are computed already in place of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


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
    conditions: Conditions = None,
    **detail: Any,
) -> list[Metric]:
    """Fréchet distance of every subject to the test images, and of training images: the floor.

    The value is the mean over ``SUBSETS`` random subsets of n.

    Args:
        paired: subject to its reference, for differences; both have the same noise.
        draws: subsets for the interval; 0 takes the first n once and gives no interval.
    """
    everyone = {**subjects, HELDOUT: floor}
    conditions = conditions or {}
    n = _smallest(target, *everyone.values())
    target = drawn_rows(target, n, seed)
    distance = FrechetDistance(target)
    detail = {"equal_count": n, "dimensions": int(target.shape[1]), **detail}

    def of_subsets(features: np.ndarray) -> np.ndarray:
        """Distances of random subsets of n, without repetition."""
        count = len(features)
        if draws == 0:
            return np.array([distance(features[:n])])
        generator = generator_of(seed, EvaluationStream.SUBSETS)
        subsets = [generator.permutation(count)[:n] for _ in range(SUBSETS if count > n else 1)]
        return np.array([distance(features[rows]) for rows in subsets])

    def interval(values: np.ndarray, spread: Subsampled, at_least: float | None) -> Interval:
        """Of the mean over subsets: the spread of the whole set, and of the choice of subsets."""
        chosen = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
        return spread.interval(float(values.mean()), chosen, at_least)

    values = {name: of_subsets(features) for name, features in everyone.items()}
    spread = {
        name: subsample(len(each), _on_rows(distance, each), seed, conditions.get(name), draws)
        for name, each in everyone.items()
    }
    metrics = []
    for name in everyone:
        over = conditions_detail(conditions.get(name)) if draws else {}
        notes = {**over, **detail, **_notes(name)}
        found = interval(values[name], spread[name], 0.0)
        metrics.append(metric(f"frechet_{space}", name, found, n, **notes))
    for name, reference in (paired or {}).items():
        differences = values[name] - values[reference]
        found = interval(differences, spread[name] - spread[reference], None)
        notes = {"reference": reference, **detail}
        metrics.append(metric(f"frechet_{space}_difference", name, found, n, **notes))
    return metrics


def kid_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    subsets: int = 50,
    conditions: Conditions = None,
    **detail: Any,
) -> list[Metric]:
    """Kernel inception distance (unbiased, cubic kernel) of every subject and of the floor.

    The value is the mean over ``subsets`` of n/2, as published.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = _smallest(target, *everyone.values())
    size = max(2, n // 2)
    target = drawn_rows(target, n, seed)
    metrics = []
    for name, features in everyone.items():
        features, shared = _drawn(name, features, n, seed, conditions)
        mean, deviation = _kid(features, target, size, subsets, seed)
        pairs = partial(_mean_of_pairs, _pair_terms(features, target))
        interval = subsample(n, pairs, seed, shared).interval(mean, deviation**2 / subsets)
        notes = {"subset": size, **conditions_detail(shared), **detail, **_notes(name)}
        metrics.append(metric(f"kid_{space}", name, interval, n, **notes))
    return metrics


def _pair_terms(features: np.ndarray, target: np.ndarray) -> np.ndarray:
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


def _mean_of_pairs(terms: np.ndarray, rows: np.ndarray) -> float:
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
        embedded = _Embedded(features.shape[1])
        kid = KernelInceptionDistance(embedded, subsets=subsets, subset_size=size)
        kid.update(torch.from_numpy(target), real=True)
        kid.update(torch.from_numpy(features), real=False)
        mean, deviation = kid.compute()
    return float(mean), float(deviation)


def vendi_score(unit: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K/n, K the cosines (Friedman & Dieng 2023, eq. 1).

    The effective number of different images, of (n, D) vectors of length 1: 1 where all are alike,
    n where all are orthogonal.
    """
    # XᵀX/n has the same eigenvalues other than 0 as K/n = XXᵀ/n.
    n, dimensions = unit.shape
    matrix = unit.T @ unit if dimensions <= n else unit @ unit.T
    values = np.linalg.eigvalsh(matrix / n)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def pairwise_diversity(unit: np.ndarray) -> float:
    """Mean of 1 − cosine over all pairs of different rows of (n, D) vectors of length 1, n ≥ 2."""
    n = len(unit)
    total = float(np.square(unit.sum(0)).sum() - np.square(unit).sum())
    return 1 - total / (n * (n - 1))


_DIVERSITY = {"vendi": vendi_score, "diversity": pairwise_diversity}


def diversity_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    seed: int,
    draws: int = DRAWS,
    conditions: Conditions = None,
    **detail: Any,
) -> list[Metric]:
    """Vendi score and mean pairwise diversity of every subject.

    Features are centred; they are scaled to length 1. ``draws`` are the subsets for the interval.
    """
    n = _smallest(*subjects.values())
    if n < 2:
        return []
    metrics = []
    for name, features in subjects.items():
        chosen, shared = _drawn(name, features.astype(np.float64), n, seed, conditions)
        unit = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        notes = {"equal_count": n, **conditions_detail(shared), **detail}
        for measured, measure in _DIVERSITY.items():
            spread = subsample(n, _on_rows(measure, unit), seed, shared, draws)
            interval = spread.interval(measure(unit), at_least=0.0)
            metrics.append(metric(f"{measured}_{space}", name, interval, n, **notes))
    return metrics


def distribution_metrics(
    inputs: Inputs, subjects: dict[str, Subject], second: Second, seed: int
) -> list[Metric]:
    """Fréchet distances, KID, precision and recall to the test images; diversity of either.

    Held out are training images against test images, for diversity the test images.
    """
    groups = np.unique(np.array(inputs.dataset.part("train").groups), return_index=True)[1]
    floor = second.train_view.take(np.sort(groups))  # one image of every group
    target = subjects[HELDOUT].view
    views = {name: subjects[name].view for name in inputs.samples}
    shared = {name: subjects[name].conditions for name in inputs.samples}
    components = fit_components(second.fit_view.pooled)

    def sides(
        features: Callable[[View], np.ndarray], dtype: Any = np.float64
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, int]:
        """Features of the subjects, the floor and the target; and the seed."""
        of = {name: features(view).astype(dtype) for name, view in views.items()}
        return of, features(floor).astype(dtype), features(target).astype(dtype), seed

    pooled, pixels, inception = (attrgetter(name) for name in ("pooled", "pixels", "inception"))
    projected = sides(lambda view: components.transform(view.pooled.astype(np.float64)))
    both = {**projected[0], HELDOUT: projected[2]}
    lite, paired = second.viewer.describe_pooled(), inputs.paired
    flat = second.viewer.describe_pixels()
    metrics = [
        *frechet_metrics("efficientnet", *projected, paired, conditions=shared, **lite),
        *frechet_metrics("pixels", *sides(pixels), paired, conditions=shared, **flat),
        *kid_metrics("efficientnet", *sides(pooled, np.float32), conditions=shared, **lite),
        *manifold_metrics("efficientnet", *projected, conditions=shared, **lite),
        *diversity_metrics("efficientnet", both, seed, conditions=shared, **lite),
    ]
    if target.inception is not None:  # as published; singular below 2048 images
        extractor: dict[str, Any] = {"extractor": "torch-fidelity inception-v3-compat, 2048"}
        metrics += frechet_metrics("inception", *sides(inception), draws=0, **extractor)
        metrics += kid_metrics(
            "inception", *sides(inception, np.float32), conditions=shared, **extractor
        )
    return metrics
