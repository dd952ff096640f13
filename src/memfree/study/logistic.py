"""Logistic dose-response in log2 of the duplication factor, with intervals of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import t as student_t

from memfree.evaluation.intervals import Interval

LARGEST_SLOPE = 50.0
"""Logits a doubling beyond which the data are separated: no finite slope fits best."""
_STEPS = 100


@dataclass(frozen=True)
class Point:
    """Copies among the samples of one dose."""

    factor: float
    """Records of the repeated images."""
    copies: float
    count: int
    """Samples."""


@dataclass(frozen=True)
class Fit:
    """P(copy) = 1 / (1 + exp(−slope · (log2 factor − log2 midpoint)))."""

    slope: Interval
    """Logits a doubling of the factor."""
    midpoint: Interval
    """Factor at which half of the samples are copies; it may lie outside of what was measured."""
    dispersion: float
    """Variance over that of independent samples, at least 1."""

    def rate(self, factor: np.ndarray) -> np.ndarray:
        """The fitted share of copies at each factor."""
        dose = np.log2(np.asarray(factor, float)) - math.log2(self.midpoint.value)
        return expit(self.slope.value * dose)


def fit_logistic(points: Sequence[Point], level: float = 0.95) -> Fit | None:
    """Fit by maximum likelihood (Newton's method), with quasi-binomial intervals.

    Trained models differ more than samples of one model do, and the curve need not be logistic:
    the variance is scaled by Pearson's χ² over its degrees of freedom where that is above 1
    (McCullagh and Nelder, 1989, 4.5), and the quantile is Student's t. The interval of the midpoint
    is Wald's on the log2 scale (delta method).

    Args:
        points: one a factor and training seed, at two factors or more.
        level: two-sided.

    Returns:
        None where there is no finite best fit: one factor, no copies, nothing but copies, or
        factors that separate the two.
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
    return _with_intervals(beta, x, y, n, level)


def _with_intervals(
    beta: np.ndarray, x: np.ndarray, y: np.ndarray, n: np.ndarray, level: float
) -> Fit | None:
    p = expit(x @ beta)
    variance = n * p * (1 - p)
    covariance = np.linalg.inv(x.T @ (variance[:, None] * x))
    freedom = len(y) - 2
    pearson = float(((y - n * p) ** 2 / np.maximum(variance, 1e-12)).sum())
    dispersion = max(1.0, pearson / freedom) if freedom else 1.0
    quantile = float(student_t.ppf((1 + level) / 2, freedom if freedom else math.inf))
    covariance = covariance * dispersion
    intercept, slope = (float(one) for one in beta)
    if slope == 0:
        return None
    middle = -intercept / slope
    gradient = np.array([-1 / slope, intercept / slope**2])  # of −a/b by a and by b
    half = quantile * math.sqrt(float(gradient @ covariance @ gradient))
    half_slope = quantile * math.sqrt(float(covariance[1, 1]))
    if abs(middle) + half > 500:  # 2 to this power is no number any more
        return None
    return Fit(
        Interval(slope, slope - half_slope, slope + half_slope),
        Interval(2.0**middle, 2.0 ** (middle - half), 2.0 ** (middle + half)),
        dispersion,
    )
