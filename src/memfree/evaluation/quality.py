"""Quality and diversity: Fréchet and kernel distances, precision, recall, Vendi score."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from memfree.data.random_streams import EvaluationStream, generator_of
from memfree.evaluation.embedding import View, fit_components
from memfree.evaluation.inputs import Inputs, Subject
from memfree.evaluation.intervals import (
    Interval,
    conditions_detail,
    effective_conditions,
    rate_interval,
    shared_conditions,
    student_quantile,
)
from memfree.evaluation.measuring import Second
from memfree.evaluation.metrics import HELDOUT, Metric, metric

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
        """Of the difference, for two statistics of the same subsets."""
        half, quarter = self.half - other.half, self.quarter - other.quarter
        return Subsampled(half, quarter, self.units, self.effective)

    def interval(
        self, value: float, further: float = 0.0, at_least: float | None = None
    ) -> Interval:
        """``value``, the statistic of the whole set, with Student's interval.

        Args:
            value: of the whole set.
            further: variance from elsewhere, as of a mean over random subsets.
            at_least: smallest value that is possible.
        """
        if not len(self.half):
            return Interval(value)
        deviation = sqrt(variance_of_whole(self) + further)
        half = student_quantile(self.effective) * deviation
        low = value - half if at_least is None else max(at_least, value - half)
        return Interval(value, low, value + half)


def subsample(
    n: int,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    clusters: np.ndarray | None = None,
    draws: int = DRAWS,
) -> Subsampled:
    """Values of a statistic on random halves and quarters of ``n`` units.

    Args:
        n: images.
        statistic: takes different row numbers int64 and returns a number.
        seed: of the subsets; equal seeds, counts and clusters give equal subsets.
        clusters: (n,) of ``shared_conditions``: subsets are of whole conditions; None for
            independent images.
        draws: subsets of either size; 0 for no interval.
    """
    codes = np.arange(n) if clusters is None else clusters
    units = int(codes.max()) + 1
    effective = float(n) if clusters is None else effective_conditions(clusters)
    none = np.array([])
    if units < MIN_UNITS or draws == 0:
        return Subsampled(none, none, units, effective)
    generator = generator_of(seed, EvaluationStream.SUBSAMPLES)

    def values(size: int) -> np.ndarray:
        found = []
        for _ in range(draws):
            chosen = np.zeros(units, dtype=bool)
            chosen[generator.permutation(units)[:size]] = True
            found.append(statistic(np.flatnonzero(chosen[codes])))
        return np.array(found)

    return Subsampled(values(units // 2), values(units // 4), units, effective)


def variance_of_whole(found: Subsampled) -> float:
    """Variance of the statistic of all n units over other sets of as many.

    A statistic with a linear and a quadratic part has variance a/m + b/m² over sets of m, and
    a·(1/m − 1/n) + b·(1/m² − 1/n²) over subsets of m out of n, as the mean of a subset has a
    finite population correction. Two sizes give a and b, neither below 0. What they come to is
    uncertain, and below the variance by halves alone (b = 0) where chance has it: the result is
    the geometric mean of both, with two thirds of the weight for that by halves.
    """
    n = found.units
    sizes = np.array([n // 2, n // 4], dtype=float)
    system = np.stack([1 / sizes - 1 / n, 1 / sizes**2 - 1 / n**2], 1)
    seen = np.array([found.half.var(ddof=1), found.quarter.var(ddof=1)])
    by_halves = float(seen[0] / system[0, 0]) / n
    linear, quadratic = np.linalg.solve(system, seen)
    if quadratic < 0:
        return by_halves
    if linear < 0:
        linear, quadratic = 0.0, seen[0] / system[0, 1]
    return (by_halves**2 * float(linear / n + quadratic / n**2)) ** (1 / 3)


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
    radius = np.concatenate(
        [
            np.partition(cdist(features[start : start + _BLOCK], features), k, axis=1)[:, k]
            for start in range(0, len(features), _BLOCK)
        ]
    )
    return np.concatenate(
        [
            (cdist(points[start : start + _BLOCK], features) <= radius).any(1)
            for start in range(0, len(points), _BLOCK)
        ]
    )


def manifold_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail: Any,
) -> list[Metric]:
    """Precision (samples among real images) and recall (real images among samples) of subjects.

    Both depend on the counts, so all sides have the same n, the smallest. Intervals are those of
    rates, of precision over the samples and of recall over the test images, with the manifolds
    held fixed.

    Args:
        space: name of the features; metrics are ``precision_{space}`` and ``recall_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images, which are the real ones.
        seed: of the rows that are drawn.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    if n <= NEIGHBOURS:
        return []
    target = drawn_rows(target, n, seed)
    metrics = []
    for name, features in everyone.items():
        features = drawn_rows(features, n, seed)
        shared = drawn_conditions((conditions or {}).get(name), n, seed)
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        for measured, found, over in (
            ("precision", on_manifold(features, target), shared),
            ("recall", on_manifold(target, features), None),
        ):
            metrics.append(
                metric(
                    f"{measured}_{space}",
                    name,
                    rate_interval(found, over),
                    n,
                    equal_count=n,
                    neighbours=NEIGHBOURS,
                    dimensions=int(target.shape[1]),
                    **conditions_detail(over),
                    **detail,
                    **notes,
                )
            )
    return metrics


def drawn_rows(features: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, the same for all features of one count."""
    generator = generator_of(seed, EvaluationStream.ROWS)
    return features[np.sort(generator.permutation(len(features))[:n])]


def drawn_conditions(conditions: np.ndarray | None, n: int, seed: int) -> np.ndarray | None:
    """Conditions of the rows that ``drawn_rows`` takes, of ``shared_conditions`` again."""
    return None if conditions is None else shared_conditions(drawn_rows(conditions, n, seed))


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
            len(each),
            partial(_distance_of_rows, distance, each),
            seed,
            (conditions or {}).get(name),
            draws,
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
    generator = generator_of(seed, EvaluationStream.SUBSETS)
    subsets = [generator.permutation(count)[:n] for _ in range(SUBSETS if count > n else 1)]
    return np.array([distance(features[rows]) for rows in subsets])


def _distance_of_rows(distance: FrechetDistance, features: np.ndarray, rows: np.ndarray) -> float:
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


def vendi_score(unit: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K/n, K the cosines (Friedman & Dieng 2023, eq. 1).

    The effective number of different images: 1 where all are alike, n where all are orthogonal.

    Args:
        unit: (n, D) vectors of length 1.
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


def diversity_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    seed: int,
    draws: int = DRAWS,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail: Any,
) -> list[Metric]:
    """Vendi score and mean pairwise diversity of every subject, at equal counts.

    The Vendi score grows with the number of images, so all have the same n, the smallest. The
    interval is what other samples of size n would give (``subsampling``).

    Args:
        space: name of the features; metrics are ``vendi_{space}`` and ``diversity_{space}``.
        subjects: name to features (count, D), centred; they are scaled to length 1.
        seed: of the rows and subsets.
        draws: subsets for the interval.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    n = min(len(features) for features in subjects.values())
    if n < 2:
        return []
    measures: tuple[tuple[str, Callable[[np.ndarray], float]], ...] = (
        ("vendi", vendi_score),
        ("diversity", pairwise_diversity),
    )
    metrics = []
    for name, features in subjects.items():
        chosen = drawn_rows(features, n, seed).astype(np.float64)
        unit = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        shared = drawn_conditions((conditions or {}).get(name), n, seed)
        for measured, measure in measures:
            spread = subsample(n, partial(_measure_of_rows, measure, unit), seed, shared, draws)
            interval = spread.interval(measure(unit), at_least=0.0)
            metrics.append(
                metric(
                    f"{measured}_{space}",
                    name,
                    interval,
                    n,
                    equal_count=n,
                    **conditions_detail(shared),
                    **detail,
                )
            )
    return metrics


def _measure_of_rows(
    measure: Callable[[np.ndarray], float], features: np.ndarray, rows: np.ndarray
) -> float:
    return measure(features[rows])


def distribution_metrics(
    inputs: Inputs, subjects: dict[str, Subject], second: Second, seed: int
) -> list[Metric]:
    """Fréchet distances, KID, precision and recall to the test images; diversity of either.

    All at equal counts; held out are training images against test images, for diversity the test
    images.
    """
    groups = np.unique(np.array(inputs.dataset.part("train").groups), return_index=True)[1]
    floor = second.train_view.take(np.sort(groups))  # one image of every group
    target = subjects[HELDOUT].view
    views = {name: subjects[name].view for name in inputs.samples}
    components = fit_components(second.fit_view.pooled)
    shared = {name: subjects[name].conditions for name in inputs.samples}

    def projected(view: View) -> np.ndarray:
        return components.transform(view.pooled.astype(np.float64))

    def pixels(view: View) -> np.ndarray:
        return view.pixels.astype(np.float64)

    metrics: list[Metric] = []
    for space, features, detail in (
        ("efficientnet", projected, second.viewer.describe_pooled()),
        ("pixels", pixels, second.viewer.describe_pixels()),
    ):
        metrics += frechet_metrics(
            space,
            {name: features(view) for name, view in views.items()},
            features(floor),
            features(target),
            seed,
            inputs.paired,
            conditions=shared,
            **detail,
        )
    metrics += kid_metrics(
        "efficientnet",
        {name: view.pooled for name, view in views.items()},
        floor.pooled,
        target.pooled,
        seed,
        conditions=shared,
        **second.viewer.describe_pooled(),
    )
    spread = {name: projected(view) for name, view in views.items()}
    described = second.viewer.describe_pooled()
    metrics += manifold_metrics(
        "efficientnet", spread, projected(floor), projected(target), seed, shared, **described
    )
    metrics += diversity_metrics(
        "efficientnet",
        {**spread, HELDOUT: projected(target)},
        seed,
        conditions=shared,
        **described,
    )
    if target.inception is not None:
        metrics += _inception_metrics(views, floor, target, seed, shared)
    return metrics


def _inception_metrics(
    views: dict[str, View],
    floor: View,
    target: View,
    seed: int,
    conditions: dict[str, np.ndarray | None],
) -> list[Metric]:
    """FID and KID as published, on torch-fidelity's Inception; singular below 2048 images."""

    def features(view: View) -> np.ndarray:
        assert view.inception is not None
        return view.inception

    subjects = {name: features(view) for name, view in views.items()}
    detail: dict[str, Any] = {"extractor": "torch-fidelity inception-v3-compat, 2048"}
    double = {name: each.astype(np.float64) for name, each in subjects.items()}
    return [
        *frechet_metrics(
            "inception",
            double,
            features(floor).astype(np.float64),
            features(target).astype(np.float64),
            seed,
            draws=0,
            **detail,
        ),
        *kid_metrics(
            "inception",
            subjects,
            features(floor),
            features(target),
            seed,
            conditions=conditions,
            **detail,
        ),
    ]
