"""Logistic dose-response in log2 of the duplication factor: a fit a training seed, then their mean.

Factors of a ladder share one training, and what a training does to one factor it does to others: a
curve through the points of all seeds takes them for independent and is far too sure. Each training
seed has a fit of its own, and Student's t over seeds says how sure their mean is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import t as student_t

from memfree.evaluation.intervals import Interval, mean_interval

LARGEST_SLOPE = 50.0
"""Logits a doubling beyond which the data are separated: no finite slope fits best."""
_STEPS = 100
_LARGEST_LOG = 500  # 2 to this power is no number any more


@dataclass(frozen=True)
class Point:
    """Copies among the samples of one dose."""

    factor: float
    """Records of the repeated images."""
    copies: float
    count: int
    """Samples."""
    seed: int = 0
    """Training seed."""


@dataclass(frozen=True)
class Fit:
    """P(copy) = 1 / (1 + exp(−intercept − slope · log2 factor)), the mean over training seeds."""

    curves: np.ndarray
    """Intercept, in logits at a factor of 1, and slope of each training seed's own fit: (k, 2)."""
    slope: Interval
    """Logits a doubling of the factor, with Student's interval over seeds; none for one seed."""
    midpoint: Interval | None
    """Factor at which half of the samples are copies, the geometric mean over seeds; it may lie
    outside of what was measured. None where the data do not determine it: where the slope's
    interval has 0 in it, or the midpoint's no end that is a number."""

    @property
    def intercept(self) -> float:
        """Logits at a factor of 1, the mean over seeds."""
        return float(self.curves[:, 0].mean())

    def rate(self, factor: np.ndarray) -> np.ndarray:
        """The fitted share of copies at each factor: of the seeds' mean logit."""
        dose = np.log2(np.asarray(factor, float))
        return expit(self.intercept + self.slope.value * dose)

    def band(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Ends of the fitted share's interval at each factor (t over seeds); None for one seed."""
        dose = np.log2(np.asarray(factor, float))
        each = [mean_interval(self.curves[:, 0] + self.curves[:, 1] * one) for one in dose.ravel()]
        if any(one.low is None for one in each):
            return None
        low, high = (
            expit(np.array(ends, dtype=float)).reshape(dose.shape)
            for ends in ([one.low for one in each], [one.high for one in each])
        )
        return low, high


def fit_logistic(points: Sequence[Point], level: float = 0.95) -> Fit | None:
    """Fit each training seed by maximum likelihood, and take the mean over seeds.

    Args:
        points: one a factor and training seed.
        level: two-sided.

    Returns:
        None where a training seed has no finite best fit, so that no mean stands for all: one
        factor, no copies, nothing but copies, or factors that separate the two.
    """
    seeds = sorted({point.seed for point in points})
    fits = [_fit_seed([point for point in points if point.seed == seed]) for seed in seeds]
    found = [fit for fit in fits if fit is not None]
    if not found or len(found) < len(fits):
        return None
    curves = np.array([beta for beta, _ in found])
    slope = mean_interval(curves[:, 1], confidence=level)
    # Seeds may agree by chance on a curve that no training tells from a flat one.
    within = math.hypot(*(half for _, half in found)) / len(found)
    over = slope.low is None or slope.high is None or not slope.low <= 0 <= slope.high
    steep = over and abs(slope.value) > within
    return Fit(curves, slope, _midpoint(curves, level) if steep else None)


def _fit_seed(points: Sequence[Point]) -> tuple[np.ndarray, float] | None:
    """Intercept and slope (Newton's method), and half the slope's interval within this training.

    That interval, quasi-binomial (McCullagh and Nelder, 1989, 4.5), only tells a curve that is
    flat: it knows nothing of other trainings.
    """
    used = [point for point in points if point.count > 0]
    if len({point.factor for point in used}) < 2:
        return None
    x = np.stack([np.ones(len(used)), np.log2([point.factor for point in used])], 1)
    n = np.array([point.count for point in used], float)
    y = np.array([point.copies for point in used], float)
    if y.sum() in (0, n.sum()):
        return None
    beta = np.zeros(2)
    for _ in range(_STEPS):
        p = expit(x @ beta)
        information = x.T @ ((n * p * (1 - p))[:, None] * x)
        try:
            step = np.linalg.solve(information, x.T @ (y - n * p))
        except np.linalg.LinAlgError:
            return None
        # Steps of at most 2 logits a parameter: from 0 a full step may overshoot for good.
        beta = beta + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if abs(beta[1]) > LARGEST_SLOPE:
            return None
        if np.abs(step).max() < 1e-10:
            break
    else:
        return None
    p = expit(x @ beta)
    variance = n * p * (1 - p)
    freedom = len(y) - 2
    pearson = float(((y - n * p) ** 2 / np.maximum(variance, 1e-12)).sum())
    dispersion = max(1.0, pearson / freedom) if freedom else 1.0
    quantile = float(student_t.ppf(0.975, freedom if freedom else math.inf))
    covariance = dispersion * np.linalg.inv(x.T @ (variance[:, None] * x))
    return beta, quantile * math.sqrt(float(covariance[1, 1]))


def _midpoint(curves: np.ndarray, level: float) -> Interval | None:
    """Mean over seeds of the factors' logarithms at which the curves cross one half."""
    if not curves[:, 1].all():
        return None
    middle = mean_interval(-curves[:, 0] / curves[:, 1], confidence=level)
    ends = [middle.value if end is None else end for end in (middle.low, middle.high)]
    if max(map(abs, ends)) > _LARGEST_LOG:
        return None
    if middle.low is None or middle.high is None:
        return Interval(2.0**middle.value)
    return Interval(2.0**middle.value, 2.0**middle.low, 2.0**middle.high)
