"""Confidence intervals: Wilson, Newcombe, bootstrap over clusters, false discovery rates.

Intervals are two-sided, over independent samples, or over conditions where ``clusters`` (n,) of
``shared_conditions`` are given.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf, isnan, sqrt
from statistics import NormalDist

import numpy as np
from scipy.special import betaln, stdtrit

from memfree.data.random_streams import generator_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval; a bound is None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends of an interval that has them."""
        assert self.low is not None and self.high is not None
        return self.low, self.high


def shared_conditions(conditions: Sequence[Hashable] | np.ndarray | None) -> np.ndarray | None:
    """Number of each sample's condition (a caption or class), (n,) int64.

    None where no two samples share a condition, and where all share one, which says nothing about
    other conditions.
    """
    if conditions is None:
        return None
    codes = np.unique(np.asarray(conditions), return_inverse=True)[1].astype(np.int64).ravel()
    return codes if 1 < len(np.bincount(codes)) < len(codes) else None


def conditions_detail(clusters: np.ndarray | None) -> dict[str, int]:
    """For a metric's detail: over how many ``conditions`` its interval is; empty for samples."""
    return {} if clusters is None else {"conditions": int(clusters.max()) + 1}


def _kish(weights: np.ndarray) -> float:
    """Kish's effective number (Σ w)²/Σ w²."""
    return float(weights.sum()) ** 2 / float((weights**2).sum())


def effective_conditions(clusters: np.ndarray) -> float:
    """Kish's effective number of conditions of unequal size."""
    return _kish(np.bincount(clusters).astype(float))


def rate_interval(
    flags: np.ndarray, clusters: np.ndarray | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """Share of samples whose flag (n,) bool is set; of independent samples with Wilson's interval.

    Rates of conditions are draws from a beta distribution; the interval is that of its mean in the
    posterior of the beta-binomial flags: Jeffreys's prior of the mean, a uniform prior of the
    correlation within a condition, which then need not be known where no flag is set.
    """
    hits, n = int(np.count_nonzero(flags)), len(flags)
    if clusters is None:
        return wilson(hits, n, confidence)
    cumulative, grid = _posterior(flags, clusters)
    low, high = np.interp(tail_quantiles(confidence), cumulative, grid)
    value = hits / n
    # Conditions of unequal size may weigh otherwise than the posterior does.
    low, high = min(float(low), value), max(float(high), value)
    return Interval(value, 0.0 if hits == 0 else low, 1.0 if hits == n else high)


def _posterior(flags: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative posterior of the mean rate over conditions, and the rates where it is given."""
    counts = np.bincount(clusters)
    hits = np.bincount(clusters, np.asarray(flags, dtype=float))
    # Rates of equal mass in Jeffreys's prior, Beta(1/2, 1/2), the arcsine distribution.
    mean = np.sin(np.pi / 2 * (np.arange(200) + 0.5) / 200) ** 2
    correlation = (np.arange(20) + 0.5) / 20
    precision = 1 / correlation - 1  # a + b of the beta distribution
    a, b = mean[:, None] * precision, (1 - mean[:, None]) * precision
    pairs, times = np.unique(np.stack([hits, counts], 1), axis=0, return_counts=True)
    log = np.zeros_like(a)
    for (hit, count), weight in zip(pairs, times, strict=True):
        log += weight * (betaln(hit + a, count - hit + b) - betaln(a, b))
    mass = np.exp(log - log.max()).sum(1)
    return (mass.cumsum() - mass / 2) / mass.sum(), mean


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval, which has a width at 0 and n successes too; n may be fractional."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound equals the rate; rounding must not leave 1e-19 in its place.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Interval(rate, low, high)


def weighted_rate(flags: np.ndarray, weights: np.ndarray) -> Interval:
    """Rate Σ w·flag / Σ w with Wilson's interval at Kish's effective size; not all weights 0."""
    effective = _kish(weights)
    rate = float((weights * flags).sum()) / float(weights.sum())
    return wilson(min(rate, 1.0) * effective, effective)


def paired_rate_difference(
    flags: np.ndarray,
    reference: np.ndarray,
    confidence: float = CONFIDENCE,
    clusters: np.ndarray | None = None,
) -> Interval:
    """``flags.mean() - reference.mean()`` of the same units (Newcombe 1998, paired, method 10).

    Two intervals of rates, squared and added with the correlation of the pairs: unlike a bootstrap
    it has a width where both rates are 0, which is where mitigations end up.
    """
    if len(flags) != len(reference) or len(flags) == 0:
        raise ValueError(f"pairs need equal counts, got {len(flags)} and {len(reference)}")
    a, b = flags.astype(bool), reference.astype(bool)
    first, second = (rate_interval(each, clusters, confidence) for each in (a, b))
    (low, high), (low2, high2) = first.bounds, second.bounds
    phi = _newcombe_phi(a, b) if clusters is None else _condition_correlation(a, b, clusters)

    def joined(x: float, y: float) -> float:
        return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    value = first.value - second.value
    down = joined(first.value - low, high2 - second.value)
    up = joined(second.value - low2, high - first.value)
    return Interval(value, value - down, value + up)


def _condition_correlation(a: np.ndarray, b: np.ndarray, clusters: np.ndarray) -> float:
    """Correlation of two rates over conditions; 0 where one of them is the same in all."""
    first, second = (np.bincount(clusters, each - each.mean()) for each in (a, b))
    scale = sqrt(float((first**2).sum() * (second**2).sum()))
    correlation = float((first * second).sum()) / scale if scale > 1e-12 else 0.0
    # Two conditions always correlate fully, and fewer than five hardly tell: they are not taken at
    # their word where that would make a difference look surer.
    known = min(max(effective_conditions(clusters) - 2, 0.0) / 3, 1.0)
    return correlation * known if correlation > 0 else correlation


def _newcombe_phi(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the 2×2 table, with Newcombe's continuity correction."""
    both, only_a, only_b, neither = (float(cell.sum()) for cell in (a & b, a & ~b, ~a & b, ~a & ~b))
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - len(a) / 2, 0.0)
    return cross / sqrt(margins)


def rate_ratio(
    flags: np.ndarray,
    base: np.ndarray,
    weights: np.ndarray,
    seed: int,
    clusters: np.ndarray | None = None,
    draws: int = 4000,
) -> Interval:
    """Ratio of the rate of ``flags`` (n,) to the weighted rate of ``base`` (m,), which is not 0.

    Draws of Jeffreys's posteriors have a width where a rate is 0, and none of them is 0 itself.
    """
    generator = generator_of(seed)
    below = weighted_rate(base, weights)
    units = _kish(weights)
    base_hits = below.value * units
    floor = generator.beta(base_hits + 0.5, max(units - base_hits, 0.0) + 0.5, draws)
    hits, n = int(np.count_nonzero(flags)), len(flags)
    if clusters is None:
        rates = generator.beta(hits + 0.5, n - hits + 0.5, draws)
    else:
        rates = np.interp(generator.random(draws), *_posterior(flags, clusters))
    value = hits / n / below.value
    low, high = (float(end) for end in np.quantile(rates / floor, tail_quantiles()))
    return Interval(value, 0.0 if hits == 0 else min(low, value), max(high, value))


def mean_interval(
    values: np.ndarray, clusters: np.ndarray | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """Mean of (n,) finite values with Student's interval, over conditions by sums of residuals."""
    n, mean = len(values), float(np.mean(values))
    codes = np.arange(n) if clusters is None else clusters
    sums = np.bincount(codes, values - mean)
    if len(sums) < 2:
        return Interval(mean)
    error = sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / n
    half = student_quantile(effective_conditions(codes), confidence) * error
    return Interval(mean, mean - half, mean + half)


def quantile_interval(
    values: np.ndarray,
    share: float,
    clusters: np.ndarray | None = None,
    confidence: float = CONFIDENCE,
    at_least: float = -inf,
    at_most: float = inf,
) -> Interval:
    """Quantile of (n,) values; inside are values v for which the rate of "≤ v" may be ``share``.

    The interval covers as that of rates does, and needs no density. Where the population's quantile
    may lie beyond all values, it ends at ``at_least`` or ``at_most``, the possible range.
    """
    quantile, ordered = float(np.quantile(values, share)), np.sort(values)
    nothing = np.zeros(len(values), dtype=bool)

    def bounds(flags: np.ndarray) -> tuple[float, float]:
        return rate_interval(flags, clusters, confidence).bounds

    last = len(values) - 1
    places = range(last + 1)
    first = bisect_left(places, True, key=lambda i: bounds(values <= ordered[i])[1] >= share)
    beyond = bisect_left(places, True, key=lambda i: bounds(values <= ordered[i])[0] > share)
    low = at_least if bounds(nothing)[1] >= share else float(ordered[min(first, last)])
    high = at_most if bounds(~nothing)[0] <= share else float(ordered[min(beyond, last)])
    return Interval(quantile, min(low, quantile), max(high, quantile))


def bootstrap(
    n: int,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    draws: int = 1000,
    confidence: float = CONFIDENCE,
    clusters: np.ndarray | None = None,
    units: float | None = None,
) -> Interval:
    """Expanded percentile bootstrap of a function of row numbers, over units or whole conditions.

    Percentiles are those of Student's t with the units' spread (Hesterberg 2015, section 5.3),
    which ten conditions need and a thousand samples do not notice. ``units`` is the effective
    number that the statistic rests on, where it is smaller.
    """
    value = float(statistic(np.arange(n)))
    codes = np.arange(n) if clusters is None else clusters
    units = effective_conditions(codes) if units is None else units
    values = resampled(n, statistic, seed, draws, clusters) if units >= 2 else np.array([])
    if not len(values):
        return Interval(value)
    expanded = NormalDist().cdf(student_quantile(units, confidence) * sqrt(units / (units - 1)))
    low, high = np.quantile(values, (1 - expanded, expanded))
    return Interval(value, float(low), float(high))


def resampled(
    n: int,
    statistic: Callable[[np.ndarray], float],
    seed: int,
    draws: int,
    clusters: np.ndarray | None = None,
) -> np.ndarray:
    """Values (draws,) of a statistic on resamples, drawn again if NaN; none where most are NaN."""
    generator = generator_of(seed)
    codes = np.arange(n) if clusters is None else clusters
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    values: list[float] = []
    missing = 0
    while len(values) < draws:
        chosen = generator.integers(0, len(members), len(members))
        rows = chosen if clusters is None else np.concatenate([members[unit] for unit in chosen])
        drawn = float(statistic(rows))
        if not isnan(drawn):
            values.append(drawn)
        elif (missing := missing + 1) > draws:
            return np.array([])
    return np.array(values)


def tail_quantiles(confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two quantiles that bound a two-sided interval: 0.95 gives 0.025 and 0.975."""
    return (1 - confidence) / 2, (1 + confidence) / 2


def student_quantile(units: float, confidence: float = CONFIDENCE) -> float:
    """Quantile of Student's t over ``units``, which need not be a whole number."""
    return float(stdtrit(max(units - 1, 1e-9), (1 + confidence) / 2))


def adjusted(p_values: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's (1995) adjusted p-values, in the order given.

    The i-th smallest of m is min over j ≥ i of p_(j)·m/j, at most 1. p-values against one shared
    set of calibration images depend on each other, but positively, so that the false discovery
    rate holds (Bates et al., 2023, theorem 2).
    """
    # Not scipy.stats.false_discovery_control: it multiplies by m/j, and so differs in the last
    # bits, at exact ties too, from the values that earlier audits have on disk.
    m = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=np.float64)[order] * m / np.arange(1, m + 1)
    result = np.empty(m)
    result[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return result


def are_discoveries(q_values: np.ndarray, rate: float) -> np.ndarray:
    """Which of ``adjusted`` (m,) are discoveries at the false discovery rate, (m,) bool."""
    # p-values are multiples of 1/(n + 1), so that p_(j)·m/j is often exactly the rate, which
    # ``adjusted`` misses by the rounding of its last bits.
    return np.asarray(q_values) <= rate * (1 + 1e-9)


def fewest_discoveries(images: int, calibration_images: int, rate: float) -> int:
    """The smallest possible number of discoveries above 0; none is possible above ``images``."""
    # No p-value is below 1/(n + 1) with n calibration images, and k of m images are discoveries
    # only if the largest of their p-values is at most q·k/m.
    return math.ceil(images / (rate * (calibration_images + 1)) - 1e-9)
