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
_LARGEST_LOG = 500  # 2 to this power is no number any more


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
    """P(copy) = 1 / (1 + exp(−intercept − slope · log2 factor))."""

    slope: Interval
    """Logits a doubling of the factor."""
    intercept: float
    """Logits at a factor of 1."""
    midpoint: Interval | None
    """Factor at which half of the samples are copies; it may lie outside of what was measured.
    None where the data do not determine it: where the slope's interval has 0 in it, or the
    midpoint's no end that is a number."""
    dispersion: float
    """Variance over that of independent samples, at least 1."""
    covariance: np.ndarray
    """Of (intercept, slope), with the dispersion: (2, 2)."""
    quantile: float
    """Half the width of intervals, in standard errors."""

    def rate(self, factor: np.ndarray) -> np.ndarray:
        """The fitted share of copies at each factor."""
        return expit(self.intercept + self.slope.value * np.log2(np.asarray(factor, float)))

    def band(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the fitted share's interval at each factor (Wald's, in logits)."""
        dose = np.log2(np.asarray(factor, float))
        x = np.stack([np.ones_like(dose), dose], -1)
        half = self.quantile * np.sqrt(np.einsum("...i,ij,...j->...", x, self.covariance, x))
        logit = self.intercept + self.slope.value * dose
        return expit(logit - half), expit(logit + half)


def fit_logistic(points: Sequence[Point], level: float = 0.95) -> Fit | None:
    """Fit by maximum likelihood (Newton's method), with quasi-binomial intervals.

    Trained models differ more than samples of one model do, and the curve need not be logistic:
    the variance is scaled by Pearson's χ² over its degrees of freedom where that is above 1
    (McCullagh and Nelder, 1989, 4.5), and the quantile is Student's t. The interval of the midpoint
    is Wald's on the log2 scale (delta method); it is given only where the slope differs from 0,
    without which a flat curve, as a good mitigation leaves it, would have one of no meaning.

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
) -> Fit:
    p = expit(x @ beta)
    variance = n * p * (1 - p)
    freedom = len(y) - 2
    pearson = float(((y - n * p) ** 2 / np.maximum(variance, 1e-12)).sum())
    dispersion = max(1.0, pearson / freedom) if freedom else 1.0
    quantile = float(student_t.ppf((1 + level) / 2, freedom if freedom else math.inf))
    covariance = dispersion * np.linalg.inv(x.T @ (variance[:, None] * x))
    intercept, slope = (float(one) for one in beta)
    half = quantile * math.sqrt(float(covariance[1, 1]))
    return Fit(
        slope=Interval(slope, slope - half, slope + half),
        intercept=intercept,
        midpoint=_midpoint(intercept, slope, covariance, quantile) if abs(slope) > half else None,
        dispersion=dispersion,
        covariance=covariance,
        quantile=quantile,
    )


def _midpoint(
    intercept: float, slope: float, covariance: np.ndarray, quantile: float
) -> Interval | None:
    middle = -intercept / slope
    gradient = np.array([-1 / slope, intercept / slope**2])  # of −a/b by a and by b
    half = quantile * math.sqrt(float(gradient @ covariance @ gradient))
    if abs(middle) + half > _LARGEST_LOG:
        return None
    return Interval(2.0**middle, 2.0 ** (middle - half), 2.0 ** (middle + half))
