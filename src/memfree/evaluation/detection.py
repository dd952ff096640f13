"""How well a score tells copies from other samples: ROC curve, AUC, and two scores compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from sklearn.metrics import roc_auc_score, roc_curve

from memfree.evaluation.intervals import Interval, bootstrap

MIN_EACH = 10
"""Samples of each kind below which no interval is given: resamples would lack a kind."""


@dataclass(frozen=True)
class Detector:
    """A score as a detector of copies; higher scores say copy."""

    roc: pa.Table
    """Columns threshold, false_positive_rate, true_positive_rate: called a copy is what is at or
    above the threshold; from +∞ (nothing is called) down."""
    auc: Interval
    """Area under the curve: the chance that a copy scores higher than another sample (ties count
    half). 0.5 says nothing, below 0.5 points the other way."""
    copies: int
    """Samples that are copies in truth."""
    others: int
    """Samples that are not."""

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Share of the copies found where at most this share of the others is called a copy."""
        found = self.roc["true_positive_rate"].to_numpy()
        return float(found[self.roc["false_positive_rate"].to_numpy() <= false_positive_rate].max())


def detector(scores: np.ndarray, copies: np.ndarray, seed: int = 0, draws: int = 1000) -> Detector:
    """ROC curve and AUC of a score, with a bootstrap interval over the samples.

    Args:
        scores: (n,) finite; σ of ours, or Wen's norm.
        copies: (n,) bool, the truth: by a measure that no compared score is made of.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Raises:
        ValueError: lengths differ, a score is not finite, or all samples are of one kind.
    """
    scores, truth = _checked(scores, copies)
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    roc = pa.table(
        {"threshold": thresholds, "false_positive_rate": false, "true_positive_rate": true}
    )
    count = int(truth.sum())
    auc = Interval(float(roc_auc_score(truth, scores)))
    if min(count, len(truth) - count) >= MIN_EACH:
        auc = bootstrap(
            len(truth), lambda rows: float(roc_auc_score(truth[rows], scores[rows])), seed, draws
        )
    return Detector(roc, auc, count, len(truth) - count)


def auc_difference(
    first: np.ndarray, second: np.ndarray, copies: np.ndarray, seed: int = 0, draws: int = 1000
) -> Interval:
    """AUC of the first score minus that of the second, on the same samples, resampled together.

    Args:
        first: (n,) finite.
        second: (n,) finite, of the same samples.
        copies: (n,) bool, the truth.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Raises:
        ValueError: as ``detector``; or fewer than 10 samples of a kind.
    """
    first, truth = _checked(first, copies)
    second, _ = _checked(second, copies)
    count = int(truth.sum())
    if min(count, len(truth) - count) < MIN_EACH:
        raise ValueError(
            f"comparing detectors needs at least {MIN_EACH} copies and {MIN_EACH} other samples, "
            f"not {count} and {len(truth) - count}"
        )

    def difference(rows: np.ndarray) -> float:
        one, two = (roc_auc_score(truth[rows], scores[rows]) for scores in (first, second))
        return float(one - two)

    return bootstrap(len(truth), difference, seed, draws)


def _checked(scores: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(copies, dtype=bool)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise ValueError(f"there are {scores.shape} scores for {truth.shape} samples")
    if not np.isfinite(scores).all():
        raise ValueError("a detection score is NaN or infinite")
    if truth.all() or not truth.any():
        raise ValueError(
            f"a ROC curve needs copies and other samples; of {len(truth)} samples "
            f"{int(truth.sum())} are copies"
        )
    return scores, truth
