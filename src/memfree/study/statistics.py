"""Means over training seeds, and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import t as student_t

from memfree.evaluation.intervals import Interval, wilson


@dataclass(frozen=True)
class Measured:
    """One metric of one subject in one cell."""

    value: float
    count: int
    """Images it was measured on."""


def over_seeds(values: list[float], level: float = 0.95) -> Interval:
    """Mean over training seeds with its two-sided interval (Student's t); none for one seed."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def amount_over_seeds(measured: list[Measured], level: float = 0.95) -> Interval:
    """Mean over training seeds of what is never negative, a distance or a number of copies."""
    found = over_seeds([one.value for one in measured], level)
    return Interval(found.value, None if found.low is None else max(found.low, 0.0), found.high)


def rate_over_seeds(measured: list[Measured], level: float = 0.95) -> Interval:
    """Mean rate over training seeds; the wider of Student's t and of Wilson's pooled interval.

    Student's t alone has no width where every seed gives 0, which is where mitigations end up.
    """
    found = over_seeds([one.value for one in measured], level)
    total = sum(one.count for one in measured)
    pooled = wilson(min(sum(one.value * one.count for one in measured), total), total, level)
    assert pooled.low is not None and pooled.high is not None
    low = pooled.low if found.low is None else max(0.0, min(found.low, pooled.low))
    high = pooled.high if found.high is None else min(1.0, max(found.high, pooled.high))
    return Interval(found.value, low, high)


def upper_limit(differences: list[float], level: float = 0.95) -> float:
    """One-sided upper limit of a mean over training seeds (Student's t); NaN for one seed."""
    high = over_seeds(differences, 2 * level - 1).high
    return math.nan if high is None else high


def upper_limit_of_rates(own: list[Measured], other: list[Measured], level: float = 0.95) -> float:
    """One-sided upper limit of a difference of rates over training seeds.

    The larger of Student's t over the seeds' differences and of Newcombe's limit for the pooled
    counts (method 10 without pairing): what three equal seeds hide, the counts still know.
    """
    by_seed = upper_limit([a.value - b.value for a, b in zip(own, other, strict=True)], level)
    a, b = _pooled(own, level), _pooled(other, level)
    assert a.high is not None and b.low is not None
    pooled = a.value - b.value + math.hypot(a.high - a.value, b.value - b.low)
    return pooled if math.isnan(by_seed) else max(by_seed, pooled)


def _pooled(measured: list[Measured], level: float) -> Interval:
    """Wilson's interval of all seeds' images together, one-sided at ``level`` on either side."""
    total = sum(one.count for one in measured)
    return wilson(min(sum(one.value * one.count for one in measured), total), total, 2 * level - 1)
