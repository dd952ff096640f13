"""How different the images of one set are from each other: Vendi score and mean distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from memfree.evaluation.intervals import conditions_detail
from memfree.evaluation.manifold import drawn_conditions, drawn_rows
from memfree.evaluation.metrics import Metric, metric
from memfree.evaluation.subsampling import DRAWS, subsample


def vendi_score(unit: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K/n, K the cosines (Friedman & Dieng 2023, eq. 1).

    The effective number of different images: 1 where all are alike, n where all are orthogonal.

    Args:
        unit: (n, D) vectors of length 1.
    """
    # XᵀX/n has the same eigenvalues other than 0 as K/n = XXᵀ/n.
    n, dimensions = unit.shape
    matrix = unit.T @ unit if dimensions <= n else unit @ unit.T
    values = np.linalg.eigvalsh(matrix / n)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def pairwise_diversity(unit: np.ndarray) -> float:
    """Mean of 1 − cosine over all pairs of different rows of (n, D) vectors of length 1, n ≥ 2."""
    n = len(unit)
    total = float(np.square(unit.sum(0)).sum() - np.square(unit).sum())
    return 1 - total / (n * (n - 1))


def diversity_metrics(
    space: str,
    subjects: dict[str, np.ndarray],
    seed: int,
    draws: int = DRAWS,
    conditions: Mapping[str, np.ndarray | None] | None = None,
    **detail: Any,
) -> list[Metric]:
    """Vendi score and mean pairwise diversity of every subject, at equal counts.

    The Vendi score grows with the number of images, so all have the same n, the smallest. The
    interval is what other samples of size n would give (``subsampling``).

    Args:
        space: name of the features; metrics are ``vendi_{space}`` and ``diversity_{space}``.
        subjects: name to features (count, D), centred; they are scaled to length 1.
        seed: of the rows and subsets.
        draws: subsets for the interval.
        conditions: name to (count,) of ``shared_conditions``.
        detail: written beside the numbers.
    """
    n = min(len(features) for features in subjects.values())
    if n < 2:
        return []
    measures: tuple[tuple[str, Callable[[np.ndarray], float]], ...] = (
        ("vendi", vendi_score),
        ("diversity", pairwise_diversity),
    )
    metrics = []
    for name, features in subjects.items():
        chosen = drawn_rows(features, n, seed).astype(np.float64)
        unit = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        shared = drawn_conditions((conditions or {}).get(name), n, seed)
        for measured, measure in measures:
            spread = subsample(n, partial(_of_rows, measure, unit), seed, shared, draws)
            interval = spread.interval(measure(unit), at_least=0.0)
            metrics.append(
                metric(
                    f"{measured}_{space}",
                    name,
                    interval,
                    n,
                    equal_count=n,
                    **conditions_detail(shared),
                    **detail,
                )
            )
    return metrics


def _of_rows(
    measure: Callable[[np.ndarray], float], features: np.ndarray, rows: np.ndarray
) -> float:
    return measure(features[rows])
