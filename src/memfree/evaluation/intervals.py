"""Confidence intervals: Wilson for rates, Newcombe for paired rates, bootstrap for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval; a bound is None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate; still honest at 0 and n successes, unlike ±z·se.

    Args:
        successes: how many of ``n``; need not be whole (weighted rates have an effective n).
        n: trials, > 0.
        confidence: two-sided, in (0, 1).

    Raises:
        ValueError: ``n`` is not positive, or ``successes`` is outside [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = _normal_quantile(confidence)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound equals the rate; rounding must not leave 1e-19 in its place.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Interval(rate, low, high)


def weighted_rate(flags: np.ndarray, weights: np.ndarray) -> Interval:
    """Rate Σ w·flag / Σ w with Wilson's interval at Kish's effective size (Σ w)²/Σ w².

    Args:
        flags: (n,) bool.
        weights: (n,) non-negative, not all zero.
    """
    total = float(weights.sum())
    effective = total**2 / float((weights**2).sum())
    rate = float((weights * flags).sum()) / total
    return wilson(min(rate, 1.0) * effective, effective)


def paired_rate_difference(
    flags: np.ndarray, reference: np.ndarray, confidence: float = CONFIDENCE
) -> Interval:
    """Difference of two rates over the same units (Newcombe 1998, paired data, method 10).

    Two Wilson intervals, squared and added with the correlation of the pairs: unlike a bootstrap
    it has a width where both rates are 0, which is where mitigations end up.

    Args:
        flags: (n,) bool; ``flags.mean() - reference.mean()`` is the value.
        reference: (n,) bool, the same units in the same order.
        confidence: two-sided.
    """
    if len(flags) != len(reference) or len(flags) == 0:
        raise ValueError(f"pairs need equal counts, got {len(flags)} and {len(reference)}")
    a, b = flags.astype(bool), reference.astype(bool)
    first = wilson(int(a.sum()), len(a), confidence)
    second = wilson(int(b.sum()), len(b), confidence)
    phi = _newcombe_phi(
        float((a & b).sum()), float((a & ~b).sum()), float((~a & b).sum()), float((~a & ~b).sum())
    )
    assert first.low is not None and first.high is not None
    assert second.low is not None and second.high is not None
    down = (first.value - first.low, second.high - second.value)
    up = (second.value - second.low, first.high - first.value)
    value = first.value - second.value
    return Interval(value, value - _joined(*down, phi), value + _joined(*up, phi))


def _newcombe_phi(both: float, only_a: float, only_b: float, neither: float) -> float:
    """Correlation of the 2×2 table, with Newcombe's continuity correction."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    n = both + only_a + only_b + neither
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    return cross / sqrt(margins)


def _joined(x: float, y: float, phi: float) -> float:
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def bootstrap(
    n: int,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    draws: int = 1000,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap over ``n`` units.

    Args:
        n: how many units there are.
        statistic: takes row numbers (n,) int64, with repetitions, and returns a number.
        seed: of the resampling.
        draws: resamplings.
        confidence: two-sided.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, n, n)) for _ in range(draws)]
    low, high = np.quantile(values, tail_quantiles(confidence))
    return Interval(float(statistic(np.arange(n))), float(low), float(high))


def tail_quantiles(confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two quantiles that bound a two-sided interval: 0.95 gives 0.025 and 0.975."""
    return (1 - confidence) / 2, (1 + confidence) / 2


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def centred(value: float, resampled: np.ndarray) -> Interval:
    """Interval of ``value`` with the spread, but not the bias, of the resampled values."""
    if len(resampled) == 0:
        return Interval(value)
    low, high = np.quantile(resampled - resampled.mean(), tail_quantiles())
    return Interval(value, value + float(low), value + float(high))
