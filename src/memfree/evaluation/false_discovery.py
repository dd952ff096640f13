"""Which of many p-values are discoveries, at a stated false discovery rate (Benjamini–Hochberg)."""

from __future__ import annotations

import math

import numpy as np


def adjusted(p_values: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's (1995) adjusted p-values, in the order given.

    The i-th smallest of m is min over j ≥ i of p_(j)·m/j, at most 1. Those that are at most q are
    the discoveries at false discovery rate q (``are_discoveries``). p-values against one shared set
    of calibration images depend on each other, but positively, so that the rate holds (Bates et
    al., 2023, theorem 2).

    Args:
        p_values: (m,) in (0, 1].
    """
    m = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=np.float64)[order] * m / np.arange(1, m + 1)
    smallest = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    result = np.empty(m)
    result[order] = smallest
    return result


def are_discoveries(q_values: np.ndarray, rate: float) -> np.ndarray:
    """Which adjusted p-values (m,) are discoveries at the false discovery rate, (m,) bool.

    p-values are multiples of 1/(n + 1), so that p_(j)·m/j is often exactly the rate, which
    ``adjusted`` misses by the rounding of its last bits: what is equal but for those is equal.

    Args:
        q_values: what ``adjusted`` returns.
        rate: q, in (0, 1).
    """
    return np.asarray(q_values) <= rate * (1 + 1e-9)


def fewest_discoveries(images: int, calibration_images: int, rate: float) -> int:
    """The smallest number of discoveries that there can be, above none.

    No p-value is below 1/(n + 1) with n calibration images, and k of m images are discoveries only
    if the largest of their p-values is at most q·k/m. More than ``images``: no discovery is
    possible at all.
    """
    return math.ceil(images / (rate * (calibration_images + 1)) - 1e-9)
