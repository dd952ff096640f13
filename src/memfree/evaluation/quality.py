"""Quality and diversity: Fréchet and kernel distances, precision, recall, Vendi score.

Intervals are what other samples, as many and against the same test images, would give
(``subsample``). ``conditions`` of a subject are those of ``shared_conditions``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import sqrt
from operator import attrgetter
from typing import Any

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
    rate_interval,
    shared_conditions,
    student_quantile,
)
from memfree.evaluation.metrics import HELDOUT, Metric, metric

DRAWS = 100
"""Subsets of either size."""
MIN_UNITS = 8
"""Fewest images, or conditions, of an interval: a quarter of fewer would be one of them."""


@dataclass(frozen=True)
class Subsampled:
    """A statistic of random subsets of n units, of images or of whole conditions."""

    half: np.ndarray  # (draws,) of subsets of ⌊n/2⌋ units; empty where there are too few units
    quarter: np.ndarray  # (draws,) of subsets of ⌊n/4⌋ units
    units: int  # n
    effective: float  # n, or the effective number of conditions of unequal size

    def __sub__(self, other: Subsampled) -> Subsampled:
        half, quarter = self.half - other.half, self.quarter - other.quarter
        return Subsampled(half, quarter, self.units, self.effective)

    def interval(
        self, value: float, further: float = 0.0, at_least: float | None = None
    ) -> Interval:
        """Student's interval of ``value``, the statistic of the whole set.

        ``further`` is variance from elsewhere, ``at_least`` the smallest possible value.
        """
        if not len(self.half):
            return Interval(value)
        half = student_quantile(self.effective) * sqrt(self.variance_of_whole() + further)
        low = value - half if at_least is None else max(at_least, value - half)
        return Interval(value, low, value + half)

    def variance_of_whole(self) -> float:
        """Variance of the statistic of all n units over other sets of as many.

        A statistic with a linear and a quadratic part has variance a/m + b/m² over sets of m, and
        a·(1/m − 1/n) + b·(1/m² − 1/n²) over subsets of m out of n (finite population correction).
        Two sizes give a and b, neither below 0. As chance can make this smaller than the variance
        by halves alone (b = 0), the geometric mean of both is taken, two thirds of it by halves.
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
    """Values of a function of row numbers on random halves and quarters of ``n`` images.

    Equal seeds, counts and clusters give equal subsets; with ``clusters`` they are of whole
    conditions. ``draws`` 0 gives no interval.
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


def _drawn_conditions(conditions: np.ndarray | None, n: int, seed: int) -> np.ndarray | None:
    """Of the same rows, of ``shared_conditions`` again."""
    return None if conditions is None else shared_conditions(drawn_rows(conditions, n, seed))


def _on_rows(
    measure: Callable[[np.ndarray], float], features: np.ndarray
) -> Callable[[np.ndarray], float]:
    return lambda rows: measure(features[rows])


@dataclass(frozen=True)
class Sides:
    """Features (count, D) that are compared, all with the same number of images."""

    space: str  # name of the features, the end of the metrics' names
    subjects: Mapping[str, np.ndarray]
    floor: np.ndarray  # of the distinct training images, reported as ``heldout``
    target: np.ndarray  # of the test images, which all are compared with
    seed: int
    conditions: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def everyone(self) -> dict[str, np.ndarray]:
        """The subjects and the floor."""
        return {**self.subjects, HELDOUT: self.floor}

    @cached_property
    def n(self) -> int:
        """The smallest count."""
        return min(len(features) for features in (self.target, *self.everyone.values()))

    @cached_property
    def drawn_target(self) -> np.ndarray:
        """(n, D)."""
        return drawn_rows(self.target, self.n, self.seed)

    def drawn(self) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """Name, features (n, D) and conditions of everyone."""
        for name, features in self.everyone.items():
            shared = _drawn_conditions(self.conditions.get(name), self.n, self.seed)
            yield name, drawn_rows(features, self.n, self.seed), shared

    def metric(self, name: str, subject: str, interval: Interval, **detail: Any) -> Metric:
        """A metric of these features, with their detail."""
        notes = {"compared": "distinct training images"} if subject == HELDOUT else {}
        detail |= {**self.detail, **notes}
        return metric(f"{name}_{self.space}", subject, interval, self.n, **detail)


NEIGHBOURS = 3
"""k of Kynkäänniemi et al.: a point's ball reaches to its k-th nearest neighbour."""
_BLOCK = 1024


def on_manifold(points: np.ndarray, features: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Which points lie in the ball of some feature (Kynkäänniemi et al. 2019, eq. 1), (n,) bool.

    A ball's radius is the distance of a feature (m, D) to the k-th nearest of the others.
    """
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images, not {len(features)}")

    def in_blocks(rows: np.ndarray, reduce: Callable[[np.ndarray], Any]) -> np.ndarray:
        starts = range(0, len(rows), _BLOCK)
        return np.concatenate([reduce(cdist(rows[i : i + _BLOCK], features)) for i in starts])

    radius = in_blocks(features, lambda distances: np.partition(distances, k, axis=1)[:, k])
    return in_blocks(points, lambda distances: (distances <= radius).any(1))


def manifold_metrics(sides: Sides) -> list[Metric]:
    """Precision (samples among real images) and recall (real images among samples).

    Intervals are those of rates over the samples and the test images, with fixed manifolds.
    """
    if sides.n <= NEIGHBOURS:
        return []
    target = sides.drawn_target
    sizes = {"equal_count": sides.n, "neighbours": NEIGHBOURS, "dimensions": int(target.shape[1])}
    metrics = []
    for name, features, shared in sides.drawn():
        precise = rate_interval(on_manifold(features, target), shared)
        recalled = rate_interval(on_manifold(target, features))
        over = conditions_detail(shared)
        metrics += [
            sides.metric("precision", name, precise, **sizes, **over),
            sides.metric("recall", name, recalled, **sizes),
        ]
    return metrics


SUBSETS = 20
"""Subsets without repetition whose mean is a Fréchet distance at a count below the samples'."""


class _Embedded(nn.Identity):
    """Lets torchmetrics take features that are computed already in place of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class FrechetDistance:
    """Fréchet distance of Gaussians fitted to features (n, D) and to the target's (m, D)."""

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
    sides: Sides, paired: dict[str, str] | None = None, draws: int = DRAWS
) -> list[Metric]:
    """Fréchet distance of every subject to the test images, and of training images: the floor.

    The value is the mean over ``SUBSETS`` random subsets of n; with ``draws`` 0 the distance of the
    first n, without interval. ``paired`` names the reference of a subject, for differences.
    """
    n, seed, conditions = sides.n, sides.seed, sides.conditions
    distance = FrechetDistance(sides.drawn_target)
    sizes = {"equal_count": n, "dimensions": int(sides.target.shape[1])}

    def of_subsets(features: np.ndarray) -> np.ndarray:
        count = len(features)
        if draws == 0:
            return np.array([distance(features[:n])])
        generator = generator_of(seed, EvaluationStream.SUBSETS)
        subsets = [generator.permutation(count)[:n] for _ in range(SUBSETS if count > n else 1)]
        return np.array([distance(features[rows]) for rows in subsets])

    def interval(values: np.ndarray, spread: Subsampled, at_least: float | None) -> Interval:
        # The spread of the whole set, and that of the choice of subsets.
        chosen = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
        return spread.interval(float(values.mean()), chosen, at_least)

    values = {name: of_subsets(features) for name, features in sides.everyone.items()}
    spread = {
        name: subsample(len(each), _on_rows(distance, each), seed, conditions.get(name), draws)
        for name, each in sides.everyone.items()
    }
    metrics = []
    for name in sides.everyone:
        over = conditions_detail(conditions.get(name)) if draws else {}
        found = interval(values[name], spread[name], 0.0)
        metrics.append(sides.metric("frechet", name, found, **over, **sizes))
    for name, reference in (paired or {}).items():
        differences = values[name] - values[reference]
        found = interval(differences, spread[name] - spread[reference], None)
        metric_name, notes = f"frechet_{sides.space}_difference", {**sizes, **sides.detail}
        metrics.append(metric(metric_name, name, found, n, reference=reference, **notes))
    return metrics


def kid_metrics(sides: Sides, subsets: int = 50) -> list[Metric]:
    """Kernel inception distance (unbiased, cubic kernel): the mean over subsets of n/2."""
    n, seed, target = sides.n, sides.seed, sides.drawn_target
    size = max(2, n // 2)
    metrics = []
    for name, features, shared in sides.drawn():
        mean, deviation = _kid(features, target, size, subsets, seed)
        pairs = partial(_mean_of_pairs, _pair_terms(features, target))
        interval = subsample(n, pairs, seed, shared).interval(mean, deviation**2 / subsets)
        over = conditions_detail(shared)
        metrics.append(sides.metric("kid", name, interval, subset=size, **over))
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
    subjects: Mapping[str, np.ndarray],
    seed: int,
    draws: int = DRAWS,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail: Any,
) -> list[Metric]:
    """Vendi score and mean pairwise diversity of centred features, scaled to length 1."""
    n = min(len(features) for features in subjects.values())
    if n < 2:
        return []
    metrics = []
    for name, features in subjects.items():
        chosen = drawn_rows(features, n, seed).astype(np.float64)
        unit = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        shared = _drawn_conditions((conditions or {}).get(name), n, seed)
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
    shared = {name: subjects[name].conditions for name in inputs.samples}
    components = fit_components(second.fit_view.pooled)
    lite = second.viewer.describe_pooled()

    def sides(space: str, features: Callable[[View], np.ndarray], detail: dict[str, Any]) -> Sides:
        views = {name: features(subjects[name].view) for name in inputs.samples}
        return Sides(space, views, features(floor), features(target), seed, shared, detail)

    def projected(view: View) -> np.ndarray:
        return components.transform(view.pooled.astype(np.float64))

    def pixels(view: View) -> np.ndarray:
        return view.pixels.astype(np.float64)

    main = sides("efficientnet", projected, lite)
    both = {**main.subjects, HELDOUT: main.target}
    metrics = [
        *frechet_metrics(main, inputs.paired),
        *frechet_metrics(sides("pixels", pixels, second.viewer.describe_pixels()), inputs.paired),
        *kid_metrics(sides("efficientnet", attrgetter("pooled"), lite)),
        *manifold_metrics(main),
        *diversity_metrics("efficientnet", both, seed, conditions=shared, **lite),
    ]
    if target.inception is not None:  # as published; singular below 2048 images
        detail = {"extractor": "torch-fidelity inception-v3-compat, 2048"}
        single = sides("inception", attrgetter("inception"), detail)
        double = sides("inception", lambda view: np.float64(view.inception), detail)
        metrics += [*frechet_metrics(double, draws=0), *kid_metrics(single)]
    return metrics
