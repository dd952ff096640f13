"""Metrics that a study shows, and their statistics over training seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from memfree.evaluation.intervals import Interval, mean_interval, student_quantile, wilson


@dataclass(frozen=True)
class Measured:
    """One metric of one subject in one cell."""

    value: float
    count: int
    """Images it was measured on."""


Key = tuple[str, int, str, str]
"""Model (conditioning and what else is not the study's default), duplication factor, subject,
metric."""
Values = dict[Key, dict[int, Measured]]
"""What was measured, by key and training seed."""

RATES = {
    "copies": "copies, %",
    "second_copies": "second measure, %",
    "duplicated_share": "nearest is repeated, %",
    "class_agreement": "class agreement, %",
}
DISTANCES = {
    "frechet_pixels": "Fréchet, pixels",
    "frechet_efficientnet": "Fréchet, EfficientNet",
}
SHOWN = {**RATES, **DISTANCES}
"""Metrics of the tables and their titles. Seconds are left to quiet machines: studies may share
theirs, and the first sampling of a model pays for its warm-up."""
RATIO = "distance_ratio_below_third"
"""Share of samples with d_1/d_2 < 1/3, what Gu et al. (2023) count as copies."""
MARGINS = {
    "copies": 0.005,
    "second_copies": 0.005,
    "duplicated_share": 0.015,
    "frechet_pixels": 0.15,
    "frechet_efficientnet": 0.15,
}
"""Goals, fixed beforehand: upper limits of (both − oracle), of Fréchet distances relative to the
oracle's."""


def over_seeds(values: list[float], level: float = 0.95) -> Interval:
    """Mean over training seeds with its two-sided interval (Student's t); none for one seed."""
    return mean_interval(np.array(values), confidence=level)


def geometric_over_seeds(values: list[float]) -> Interval:
    """Geometric mean over training seeds, its interval that of the logarithms (Student's t)."""
    logs = over_seeds([math.log(value) for value in values])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.value), low, high)


def amount_over_seeds(measured: list[Measured]) -> Interval:
    """Mean over training seeds of what is never negative, a distance or a number of copies.

    Seeds without a single copy say nothing of how many others have: no interval.
    """
    values = [one.value for one in measured]
    if not any(values):
        return Interval(0.0)
    mean = over_seeds(values)
    return Interval(mean.value, None if mean.low is None else max(mean.low, 0.0), mean.high)


def rate_over_seeds(measured: list[Measured], level: float = 0.95) -> Interval:
    """Mean rate over training seeds; the wider of Student's t and of Wilson's pooled interval.

    Student's t alone has no width where every seed gives 0, which is where mitigations end up, and
    of rare copies, which most seeds have few of and one has many, it ends too low. Where seeds
    differ by more than chance, Wilson's interval is that of as many images as they are worth: N/φ,
    with the dispersion φ (Pearson's χ² over its degrees of freedom) of a quasi-binomial
    (McCullagh and Nelder, 1989, 4.5), and Student's quantile. One seed has no interval: its samples
    say nothing of other trainings.
    """
    mean = over_seeds([one.value for one in measured], level)
    if mean.low is None or mean.high is None:
        return mean
    low, high = _pooled(measured, level, _worth(measured, level))
    return Interval(mean.value, max(0.0, min(mean.low, low)), min(1.0, max(mean.high, high)))


def upper_limit(differences: list[float], level: float = 0.95) -> float:
    """One-sided upper limit of a mean over training seeds (Student's t); NaN for one seed."""
    high = over_seeds(differences, 2 * level - 1).high
    return math.nan if high is None else high


def upper_limit_of_rates(own: list[Measured], other: list[Measured], level: float = 0.95) -> float:
    """One-sided upper limit of a difference of rates over training seeds; NaN for one seed.

    The larger of Student's t over the seeds' differences and of Newcombe's limit for the pooled
    counts (method 10 without pairing): what three equal seeds hide, the counts still know.
    """
    by_seed = upper_limit([a.value - b.value for a, b in zip(own, other, strict=True)], level)
    if math.isnan(by_seed):
        return by_seed
    a, b = _rate(own), _rate(other)
    _, high = _pooled(own, 2 * level - 1)
    low, _ = _pooled(other, 2 * level - 1)
    return max(by_seed, a - b + math.hypot(high - a, b - low))


def _rate(measured: list[Measured]) -> float:
    return sum(one.value * one.count for one in measured) / sum(one.count for one in measured)


def _pooled(measured: list[Measured], level: float, worth: float = 1.0) -> tuple[float, float]:
    """Ends of Wilson's interval of all seeds' images together, a share ``worth`` of them."""
    total = sum(one.count for one in measured) * worth
    copies = sum(one.value * one.count for one in measured) * worth
    pooled = wilson(min(copies, total), total, level)
    assert pooled.low is not None and pooled.high is not None
    return pooled.low, pooled.high


def _worth(measured: list[Measured], level: float) -> float:
    """Share of all seeds' images by which their pooled interval is as wide as seeds differ."""
    rate = _rate(measured)
    if not 0 < rate < 1:
        return 1.0
    squares = sum(one.count * (one.value - rate) ** 2 for one in measured) / (rate * (1 - rate))
    dispersion = squares / (len(measured) - 1)
    if dispersion <= 1:
        return 1.0
    normal = NormalDist().inv_cdf((1 + level) / 2)
    return (normal / student_quantile(len(measured), level)) ** 2 / dispersion


def cells_of(values: Values) -> list[tuple[str, int]]:
    """Model and factor of every cell: unconditional models first, as they come, by factor."""
    place = {model: number for number, model in enumerate(dict.fromkeys(key[0] for key in values))}
    return sorted(
        {key[:2] for key in values},
        key=lambda cell: (not cell[0].startswith("unconditional"), place[cell[0]], cell[1]),
    )


def subjects_of(values: Values, model: str, factor: int) -> list[str]:
    """Subjects of a cell that copies were counted of, in the order of their evaluation."""
    subjects = dict.fromkeys(key[2] for key in values if key[:2] == (model, factor))
    return [name for name in subjects if (model, factor, name, "copies") in values]
