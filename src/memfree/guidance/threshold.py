"""The gate's threshold λ_t, rising as the noise falls (AMG, eq. 19)."""

from __future__ import annotations

import math
from dataclasses import dataclass

GRID_STEPS = 250
"""The paper counts t on a grid of 250 sampling steps; other grids are mapped onto it."""


@dataclass(frozen=True)
class ThresholdSchedule:
    """λ_t = a + (b − a)·exp(−c·t), with t = 250·timestep / number of training timesteps (eq. 19).

    The paper's values for nL2 are a = −1.95, b = −1.5, c = 0.025.
    """

    start: float
    """a: the value towards pure noise."""
    end: float
    """b: the value at t = 0."""
    rate: float = 0.025
    """c, above 0, per step of the 250-step grid."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate of the threshold must be above 0, not {self.rate:g}")

    def __call__(self, time: float) -> float:
        """λ at ``time`` in [0, 1], 1 being pure noise."""
        return self.start + (self.end - self.start) * math.exp(-self.rate * GRID_STEPS * time)


@dataclass(frozen=True)
class ConstantThreshold:
    """The same λ at every t: the paper's ablation of eq. 19."""

    value: float
    """λ, in units of σ."""

    def __call__(self, time: float) -> float:
        """λ, whatever the time."""
        return self.value
