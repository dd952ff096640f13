"""Calibration: thresholds on σ from held-out images, at a stated false-positive rate; p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import bdtrik, betaincinv
from torch import Tensor

from memfree.data.split import DEFAULT_RATE, MIN_EXPECTED, smallest_rate
from memfree.guidance.similarity import EmbeddingSimilarity, NormalizedL2, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Calibration:
    """σ of n held-out images against an index: the null of "this image is not a copy"."""

    similarity: str
    """Name of the similarity that was measured."""
    sigmas: Tensor
    """(n,) float32, ascending."""

    def threshold(self, false_positive_rate: float) -> float:
        """The σ above which an image is called a copy.

        It is the ⌊rate·(n+1)⌋-th largest calibration σ, so that "σ > threshold" says the same as
        "p ≤ rate".

        Args:
            false_positive_rate: share of real images that may be called copies, in (0, 1).

        Raises:
            ValueError: the rate is not in [5/n, 1).
        """
        n = len(self.sigmas)
        if not MIN_EXPECTED / n <= false_positive_rate < 1:
            raise ValueError(
                f"false_positive_rate {false_positive_rate:g} cannot be calibrated on {n} images; "
                f"choose one from {smallest_rate(n):g} up to 1, or calibrate on more images"
            )
        rank = math.floor(false_positive_rate * (n + 1) + 1e-9)
        return float(self.sigmas[n - rank])

    def p_values(self, sigma: Tensor) -> Tensor:
        """(1 + number of calibration images at least as similar) / (n + 1), for σ (B,); float64."""
        n = len(self.sigmas)
        below = torch.searchsorted(self.sigmas, sigma.detach().float().cpu().contiguous())
        return (1 + n - below).double() / (n + 1)

    def threshold_interval(
        self, false_positive_rate: float, level: float = 0.95
    ) -> tuple[float, float]:
        """Interval of the σ that the rate of real images exceeds, between two calibration σ's.

        How many of n images lie above that σ is binomial, whatever its distribution; the interval
        ends at the smallest and largest of them.
        """
        n = len(self.sigmas)
        tails = ((1 - level) / 2, (1 + level) / 2)
        fewest, most = (max(math.ceil(bdtrik(tail, n, false_positive_rate)), 0) for tail in tails)
        low, high = max(n - 1 - most, 0), min(n - fewest, n - 1)
        return float(self.sigmas[low]), float(self.sigmas[high])

    def rate_limits(self, false_positive_rate: float, level: float = 0.95) -> tuple[float, float]:
        """Between which limits the share of real images above the threshold lies.

        The threshold is the k-th largest of n calibration σ's, and what lies above it in the
        population is Beta(k, n + 1 − k): 0.4 to 1.9 % for a rate of 1 % and 600 images.

        Args:
            false_positive_rate: as of ``threshold``.
            level: two-sided.
        """
        n = len(self.sigmas)
        rank = math.floor(false_positive_rate * (n + 1) + 1e-9)
        low, high = (
            float(betaincinv(rank, n + 1 - rank, tail))
            for tail in ((1 - level) / 2, (1 + level) / 2)
        )
        return low, high

    def rate_text(self, false_positive_rate: float) -> str:
        """The rate and how sure it is: ``1 % (0.4–1.9 %, from 600 images)``."""
        return rate_text(
            false_positive_rate, self.rate_limits(false_positive_rate), len(self.sigmas)
        )

    def to_json(self) -> dict[str, Any]:
        """JSON value for ``calibration.json``: σ's, and thresholds with intervals to read."""
        n = len(self.sigmas)
        rates = [rate for rate in (0.001, 0.01, 0.05, 0.5) if rate >= MIN_EXPECTED / n]
        thresholds = []
        for rate in rates:
            low, high = self.threshold_interval(rate)
            thresholds.append(
                {
                    "false_positive_rate": rate,
                    "threshold": self.threshold(rate),
                    "low": low,
                    "high": high,
                }
            )
        return {
            "similarity": self.similarity,
            "count": n,
            "smallest_false_positive_rate": MIN_EXPECTED / n,
            "thresholds": thresholds,
            "sigmas": self.sigmas.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """The inverse of ``to_json``.

        Raises:
            ValueError: the value is not what ``to_json`` writes.
        """
        try:
            sigmas = torch.tensor(value["sigmas"], dtype=torch.float32).sort().values
            name = str(value["similarity"])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not a calibration: {error}") from error
        if sigmas.ndim != 1 or not len(sigmas) or not bool(torch.isfinite(sigmas).all()):
            raise ValueError("not a calibration: its sigmas are empty or not finite")
        return cls(name, sigmas)


def rate_text(rate: float, limits: Sequence[float], images: int | None = None) -> str:
    """A false-positive rate with the limits of ``Calibration.rate_limits``, for a verdict.

    Args:
        rate: the threshold's, as it was asked for.
        limits: lower and upper.
        images: calibration images, where the text shall say so.
    """
    low, high = (f"{100 * end:.2g}" for end in limits)
    source = "" if images is None else f", from {images:,} images"
    return f"{100 * rate:g} % ({low}–{high} %{source})"


def measure(
    index: ReferenceIndex, similarity: Similarity, images: Tensor, batch_size: int = 256
) -> Calibration:
    """σ of held-out images (N, C, H, W) in [−1, 1] that the model was never trained on."""
    if not len(images):
        raise ValueError("no calibration images: thresholds need held-out images")
    with torch.no_grad():
        sigmas = [similarity(index, part).sigma.cpu() for part in images.split(batch_size)]
    return Calibration(similarity.name, torch.cat(sigmas).float().sort().values)


def calibrate(
    index: ReferenceIndex,
    similarity: Similarity,
    calibration_images: Tensor,
    false_positive_rate: float = DEFAULT_RATE,
) -> float:
    """Measure held-out images, keep the result with the index, return the threshold in σ."""
    calibration = measure(index, similarity, calibration_images)
    threshold = calibration.threshold(false_positive_rate)
    index.calibrations[similarity.name] = calibration.to_json()
    return threshold


def calibration_of(index: ReferenceIndex, similarity: Similarity) -> Calibration:
    """The calibration kept with the index.

    Raises:
        ValueError: the index was not calibrated for this similarity, or not since it was changed.
    """
    value = index.calibrations.get(similarity.name)
    if value is None:
        raise ValueError(
            f"the index has no calibration for {similarity.name}: run `memfree index` on a data "
            "set with held-out images, or call memfree.guidance.calibrate"
        )
    if "stale" in value:
        raise ValueError(
            f"the calibration for {similarity.name} is out of date, {value['stale']} since: call "
            "memfree.guidance.calibrate with held-out images"
        )
    return Calibration.from_json(value)


def default_similarity(index: ReferenceIndex) -> Similarity:
    """NormalizedL2 for an index of distances, EmbeddingSimilarity for one of cosines.

    Raises:
        ValueError: the index is of distances and has one group: its own distance is all that nL2
            could divide by, so that σ would be the same for every image.
    """
    if index.metric != "l2":
        return EmbeddingSimilarity()
    groups = int(index.group.max()) + 1
    if groups < 2:
        raise ValueError(
            "the index has one group of images, and nL2 compares the nearest group with others: "
            "index at least 2 distinct images, or features that are compared by cosine"
        )
    return NormalizedL2(k=min(50, groups))
