"""Improved precision and recall: how much of either set lies on the other's manifold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from memfree.evaluation.intervals import conditions_detail, rate_interval, shared_conditions
from memfree.evaluation.metrics import HELDOUT, Metric, metric

NEIGHBOURS = 3
"""k of Kynkäänniemi et al.: a point's ball reaches to its k-th nearest neighbour."""
_BLOCK = 1024


def on_manifold(points: np.ndarray, features: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Which points lie in the ball of some feature (Kynkäänniemi et al. 2019, eq. 1), (n,) bool.

    A ball's radius is the distance to the k-th nearest of the other features.

    Args:
        points: (n, D).
        features: (m, D), m > k; they span the manifold.
        k: neighbours.

    Raises:
        ValueError: there are too few features.
    """
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images, not {len(features)}")
    radius = np.concatenate(
        [
            np.partition(cdist(features[start : start + _BLOCK], features), k, axis=1)[:, k]
            for start in range(0, len(features), _BLOCK)
        ]
    )
    return np.concatenate(
        [
            (cdist(points[start : start + _BLOCK], features) <= radius).any(1)
            for start in range(0, len(points), _BLOCK)
        ]
    )


def manifold_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    floor: np.ndarray,
    target: np.ndarray,
    seed: int,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail: Any,
) -> list[Metric]:
    """Precision (samples among real images) and recall (real images among samples) of subjects.

    Both depend on the counts, so all sides have the same n, the smallest. Intervals are those of
    rates, of precision over the samples and of recall over the test images, with the manifolds
    held fixed.

    Args:
        space: name of the features; metrics are ``precision_{space}`` and ``recall_{space}``.
        subjects: name to features (count, D).
        floor: (rows, D) of the distinct training images; reported for ``heldout``.
        target: (m, D) of the test images, which are the real ones.
        seed: of the rows that are drawn.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    everyone = {**subjects, HELDOUT: floor}
    n = min(len(target), *(len(features) for features in everyone.values()))
    if n <= NEIGHBOURS:
        return []
    target = drawn_rows(target, n, seed)
    metrics = []
    for name, features in everyone.items():
        features = drawn_rows(features, n, seed)
        shared = drawn_conditions((conditions or {}).get(name), n, seed)
        notes = {"compared": "distinct training images"} if name == HELDOUT else {}
        for measured, found, over in (
            ("precision", on_manifold(features, target), shared),
            ("recall", on_manifold(target, features), None),
        ):
            metrics.append(
                metric(
                    f"{measured}_{space}",
                    name,
                    rate_interval(found, over),
                    n,
                    equal_count=n,
                    neighbours=NEIGHBOURS,
                    dimensions=int(target.shape[1]),
                    **conditions_detail(over),
                    **detail,
                    **notes,
                )
            )
    return metrics


def drawn_rows(features: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, the same for all features of one count."""
    return features[np.sort(np.random.default_rng([seed, 0]).permutation(len(features))[:n])]


def drawn_conditions(conditions: np.ndarray | None, n: int, seed: int) -> np.ndarray | None:
    """Conditions of the rows that ``drawn_rows`` takes, of ``shared_conditions`` again."""
    return None if conditions is None else shared_conditions(drawn_rows(conditions, n, seed))
