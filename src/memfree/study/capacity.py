"""Effective model memorization: up to how many training images a model copies what it saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memfree.evaluation.intervals import Interval
from memfree.study.statistics import geometric_over_seeds

MEMORIZED = 0.9
"""Share of copies from which on a training set counts as memorized (Gu et al., 2023)."""


@dataclass(frozen=True)
class Capacity:
    """The largest training set that is memorized, among those that were tried."""

    largest: int | None
    """Images of it; None: no set that was tried is memorized."""
    tried: tuple[int, ...]
    """Sizes in ascending order."""
    crossing: float | None
    """Where the share falls to 90 %, on a line between ``largest`` and the next size in log2;
    None where one of the two is missing."""

    @property
    def text(self) -> str:
        """As it stands in a table."""
        if self.largest is None:
            return f"below {self.tried[0]}"
        if self.largest == self.tried[-1]:
            return f"at least {self.largest}"
        return str(self.largest)


def effective_memorization(rates: Mapping[int, float], memorized: float = MEMORIZED) -> Capacity:
    """EMM of Gu et al., "On Memorization in Diffusion Models" (2023), definition 1.

    Args:
        rates: size of the training set to share of samples with d_1/d_2 < 1/3; at least one.
        memorized: share from which on a set is memorized.
    """
    tried = tuple(sorted(rates))
    largest = max((size for size in tried if rates[size] >= memorized), default=None)
    if largest is None or largest == tried[-1]:
        return Capacity(largest, tried, None)
    beyond = tried[tried.index(largest) + 1]
    share = (rates[largest] - memorized) / (rates[largest] - rates[beyond])
    crossing = math.log2(largest) + share * math.log2(beyond / largest)
    return Capacity(largest, tried, 2.0**crossing)


@dataclass(frozen=True)
class Capacities:
    """The capacity of each training seed's models, and how sure their mean is."""

    by_seed: Mapping[int, Capacity]
    """At least one."""

    @property
    def text(self) -> str:
        """As it stands in a table: one for all seeds where they agree, else each in order."""
        each = [capacity.text for _, capacity in sorted(self.by_seed.items())]
        return each[0] if len(set(each)) == 1 else ", ".join(each)

    @property
    def crossing(self) -> Interval | None:
        """Geometric mean of the seeds' crossings with Student's interval, which one seed has not.

        None where a seed has no crossing: it lies outside of what was tried.
        """
        each = [capacity.crossing for capacity in self.by_seed.values()]
        known = [one for one in each if one is not None]
        return geometric_over_seeds(known) if len(known) == len(each) else None
