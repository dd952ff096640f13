"""How far a statistic of a whole set would vary with other sets: subsets without repetition.

A bootstrap draws images twice, which distances and diversities notice: intervals of a Fréchet
distance come out up to twice too wide where two sets are alike, those of a Vendi score nearly three
times. Subsets hold each image once. Those of a half and those of a quarter tell the part of the
variance that falls with 1/n from the part that falls with 1/n².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from memfree.evaluation.intervals import Interval, effective_conditions, student_quantile

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
    generator = np.random.default_rng([seed, 2])

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
