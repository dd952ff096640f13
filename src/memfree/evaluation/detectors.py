"""Detectors: ROC curve and AUC of a score for copies, and two scores compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import pyarrow as pa
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score, roc_curve

from memfree.evaluation.intervals import (
    Interval,
    bootstrap,
    effective_conditions,
    resampled,
    student_quantile,
    wilson,
)

MIN_EACH = 10  # samples of each kind that an interval needs: resamples would lack a kind
MIN_CONDITIONS = 5  # conditions with samples of each kind that it needs


@dataclass(frozen=True)
class Detector:
    """A score as a detector of copies; higher scores say copy."""

    roc: pa.Table
    """Columns threshold, false_positive_rate, true_positive_rate: called a copy is what is at or
    above the threshold; from +∞ (nothing is called) down."""
    auc: Interval
    """Area under the curve: the chance that a copy scores higher than another sample (ties count
    half). 0.5 says nothing, below 0.5 points the other way."""
    copies: int  # samples that are copies in truth
    others: int  # samples that are not

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Share of the copies found where at most this share of the others is called a copy."""
        rates = self.roc["true_positive_rate"].to_numpy()
        return float(rates[self.roc["false_positive_rate"].to_numpy() <= false_positive_rate].max())


def detector(
    scores: np.ndarray,
    copies: np.ndarray,
    seed: int = 0,
    draws: int = 1000,
    clusters: np.ndarray | None = None,
) -> Detector:
    """ROC curve and AUC of a score, with an interval from resampled samples, or conditions.

    Args:
        scores: (n,) finite; σ of ours, or Wen's norm.
        copies: (n,) bool, the truth: by a measure that no compared score is made of.
        seed: for the bootstrap.
        draws: resamples of the bootstrap.
        clusters: (n,) of ``shared_conditions``, the caption of each sample; None for independent
            samples.

    Raises:
        ValueError: lengths differ, a score is not finite, or all samples are of one kind.
    """
    scores, truth = _checked(scores, copies)
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    roc = pa.table(
        {"threshold": thresholds, "false_positive_rate": false, "true_positive_rate": true}
    )
    auc = Interval(float(roc_auc_score(truth, scores)))
    if not _missing(truth, clusters):
        ranks = np.unique(scores, return_inverse=True)[1]
        values = resampled(len(truth), lambda rows: _auc(ranks, truth, rows), seed, draws, clusters)
        auc = _auc_interval(auc.value, values, _effective_units(truth, clusters))
    return Detector(roc, auc, int(truth.sum()), int((~truth).sum()))


def _auc_interval(auc: float, values: np.ndarray, units: float) -> Interval:
    """Student's interval of the AUC's logit, by the spread of its resampled values."""
    if not len(values):
        return Interval(auc)
    if auc in (0.0, 1.0):  # resamples of kinds that never mix do not mix either
        return replace(wilson(auc * units, units), value=auc)
    deviation = float(values.std()) * sqrt(units / (units - 1))
    half = student_quantile(units) * deviation / (auc * (1 - auc))
    return Interval(auc, float(expit(logit(auc) - half)), float(expit(logit(auc) + half)))


def auc_difference(
    first: np.ndarray,
    second: np.ndarray,
    copies: np.ndarray,
    seed: int = 0,
    draws: int = 1000,
    clusters: np.ndarray | None = None,
) -> Interval:
    """AUC of the first score minus that of the second, on the same samples, resampled together.

    Arguments are those of ``detector``.

    Raises:
        ValueError: as ``detector``; or fewer than 10 samples, or 5 conditions, of a kind.
    """
    first, truth = _checked(first, copies)
    second, _ = _checked(second, copies)
    if missing := _missing(truth, clusters):
        raise ValueError(f"comparing detectors needs at least {missing}")
    ranks = [np.unique(scores, return_inverse=True)[1] for scores in (first, second)]

    def difference(rows: np.ndarray) -> float:
        return _auc(ranks[0], truth, rows) - _auc(ranks[1], truth, rows)

    units = _effective_units(truth, clusters)
    interval = bootstrap(len(truth), difference, seed, draws, clusters=clusters, units=units)
    if interval.low == interval.high and not np.array_equal(ranks[0], ranks[1]):
        return Interval(interval.value)  # two scores that never err here may do so elsewhere
    return interval


def _auc(ranks: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> float:
    """AUC of some rows, with repetitions; NaN where they are of one kind."""
    copies, others = (np.bincount(ranks[rows], kind[rows]) for kind in (truth, ~truth))
    pairs = copies.sum() * others.sum()
    below = others.cumsum() - others / 2
    return float(copies @ below / pairs) if pairs else float("nan")


def _missing(truth: np.ndarray, clusters: np.ndarray | None) -> str:
    """What an interval needs and the samples do not have; empty where they have it."""
    copies, others = int(truth.sum()), int((~truth).sum())
    if min(copies, others) < MIN_EACH:
        return f"{MIN_EACH} copies and {MIN_EACH} other samples, not {copies} and {others}"
    if clusters is not None:
        copies, others = (len(np.unique(clusters[kind])) for kind in (truth, ~truth))
        if min(copies, others) < MIN_CONDITIONS:
            return (
                f"{MIN_CONDITIONS} conditions with copies and {MIN_CONDITIONS} with other samples, "
                f"not {copies} and {others}"
            )
    return ""


def _effective_units(truth: np.ndarray, clusters: np.ndarray | None) -> float:
    """Independent samples, or conditions, of the kind that has fewer of them."""
    if clusters is None:
        return float(min(truth.sum(), (~truth).sum()))
    return min(effective_conditions(clusters[kind]) for kind in (truth, ~truth))


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
