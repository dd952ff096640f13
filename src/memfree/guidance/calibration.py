"""Calibration: thresholds on σ from held-out images at a stated false-positive rate; p-values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import bdtrik, betaincinv
from torch import Tensor

from memfree.data.split import DEFAULT_RATE, MIN_EXPECTED, smallest_rate
from memfree.guidance.similarity import EmbeddingSimilarity, Match, NormalizedL2, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Calibration:
    """σ of n held-out images against an index: the null of "this image is not a copy"."""

    similarity: str
    sigmas: Tensor  # (n,) float32, ascending

    def threshold(self, false_positive_rate: float) -> float:
        """The σ above which an image is called a copy (p ≤ rate); the rate is in [5/n, 1)."""
        n = len(self.sigmas)
        if not MIN_EXPECTED / n <= false_positive_rate < 1:
            raise ValueError(
                f"false_positive_rate {false_positive_rate:g} cannot be calibrated on {n} images; "
                f"choose one from {smallest_rate(n):g} up to 1, or calibrate on more images"
            )
        return float(self.sigmas[n - self._rank(false_positive_rate)])

    def _rank(self, rate: float) -> int:
        """k: the threshold is the k-th largest calibration σ, k = ⌊rate·(n+1)⌋."""
        return math.floor(rate * (len(self.sigmas) + 1) + 1e-9)

    def p_values(self, sigma: Tensor) -> Tensor:
        """(1 + calibration images at least as similar) / (n + 1), for σ (B,); float64."""
        n = len(self.sigmas)
        below = torch.searchsorted(self.sigmas, sigma.detach().float().cpu().contiguous())
        return (1 + n - below).double() / (n + 1)

    def threshold_interval(
        self, false_positive_rate: float, level: float = 0.95
    ) -> tuple[float, float]:
        """Interval of the threshold in σ: how many of n images exceed it is binomial."""
        n = len(self.sigmas)
        fewest, most = (
            max(math.ceil(bdtrik(tail, n, false_positive_rate)), 0) for tail in _tails(level)
        )
        low, high = max(n - 1 - most, 0), min(n - fewest, n - 1)
        return float(self.sigmas[low]), float(self.sigmas[high])

    def rate_limits(self, false_positive_rate: float, level: float = 0.95) -> tuple[float, float]:
        """Two-sided limits of the share of real images above the threshold, Beta(k, n + 1 − k)."""
        rank = self._rank(false_positive_rate)
        rest = len(self.sigmas) + 1 - rank
        low, high = (float(betaincinv(rank, rest, tail)) for tail in _tails(level))
        return low, high

    def rate_text(self, false_positive_rate: float) -> str:
        """The rate with its limits: ``1 % (0.4–1.9 %, from 600 images)``."""
        limits = self.rate_limits(false_positive_rate)
        return rate_text(false_positive_rate, limits, len(self.sigmas))

    def to_json(self) -> dict[str, Any]:
        """JSON value for ``calibration.json``; its thresholds and intervals are for readers."""
        n, thresholds = len(self.sigmas), []
        for rate in (0.001, 0.01, 0.05, 0.5):
            if rate >= MIN_EXPECTED / n:
                low, high = self.threshold_interval(rate)
                interval = {"threshold": self.threshold(rate), "low": low, "high": high}
                thresholds.append({"false_positive_rate": rate, **interval})
        return {
            "similarity": self.similarity,
            "count": n,
            "smallest_false_positive_rate": MIN_EXPECTED / n,
            "thresholds": thresholds,
            "sigmas": self.sigmas.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """The inverse of ``to_json``; refuses anything else with a ValueError."""
        try:
            sigmas = torch.tensor(value["sigmas"], dtype=torch.float32).sort().values
            name = str(value["similarity"])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not a calibration: {error}") from error
        if sigmas.ndim != 1 or not len(sigmas) or not bool(torch.isfinite(sigmas).all()):
            raise ValueError("not a calibration: its sigmas are empty or not finite")
        return cls(name, sigmas)


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def rate_text(rate: float, limits: Sequence[float], images: int | None = None) -> str:
    """A false-positive rate with its ``Calibration.rate_limits`` and the number of images."""
    low, high = (f"{100 * end:.2g}" for end in limits)
    source = "" if images is None else f", from {images:,} images"
    return f"{100 * rate:g} % ({low}–{high} %{source})"


@torch.no_grad()
def nearest(
    index: ReferenceIndex,
    similarity: Similarity,
    images: Tensor,
    batch_size: int = 256,
    each: Callable[[Match], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """σ and row of the nearest reference of images (n, C, H, W), each (n,), on the CPU."""
    sigmas, rows = [], []
    for batch in images.split(batch_size):
        match = similarity(index, batch.to(index.device))
        if each is not None:
            each(match)
        sigmas.append(match.sigma.cpu())
        rows.append(match.rows[:, 0].cpu())
    return torch.cat(sigmas), torch.cat(rows)


@dataclass(frozen=True)
class Judge:
    """Calls finished images copies, or not, at a false-positive rate."""

    index: ReferenceIndex
    similarity: Similarity
    calibration: Calibration
    false_positive_rate: float

    @property
    def threshold(self) -> float:
        """The σ above which an image is a copy."""
        return self.calibration.threshold(self.false_positive_rate)

    def __call__(
        self, images: Tensor, batch_size: int, each: Callable[[Match], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """σ (float64), nearest row, p-value and σ > threshold of images in [−1, 1], on the CPU."""
        sigma, row = nearest(self.index, self.similarity, images, batch_size, each)
        sigma = sigma.double()
        return sigma, row, self.calibration.p_values(sigma), sigma > self.threshold


def measure(
    index: ReferenceIndex, similarity: Similarity, images: Tensor, batch_size: int = 256
) -> Calibration:
    """Calibrate on images (N, C, H, W) in [−1, 1] that the model was never trained on."""
    if not len(images):
        raise ValueError("no calibration images: thresholds need held-out images")
    sigma, _ = nearest(index, similarity, images, batch_size)
    return Calibration(similarity.name, sigma.float().sort().values)


def calibrate(
    index: ReferenceIndex,
    similarity: Similarity,
    calibration_images: Tensor,
    false_positive_rate: float = DEFAULT_RATE,
) -> float:
    """Measure held-out images, store the result in the index and return the threshold in σ."""
    calibration = measure(index, similarity, calibration_images)
    threshold = calibration.threshold(false_positive_rate)
    index.calibrations[similarity.name] = calibration.to_json()
    return threshold


def calibration_of(index: ReferenceIndex, similarity: Similarity) -> Calibration:
    """The index's calibration; ValueError if there is none or the index changed since."""
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
    """NormalizedL2 for an index of distances (2 groups or more), else EmbeddingSimilarity."""
    if index.metric != "l2":
        return EmbeddingSimilarity()
    groups = int(index.group.max()) + 1
    if groups < 2:
        raise ValueError(
            "the index has one group of images, and nL2 compares the nearest group with others: "
            "index at least 2 distinct images, or features that are compared by cosine"
        )
    return NormalizedL2(k=min(50, groups))
