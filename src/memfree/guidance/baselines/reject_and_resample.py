"""Rejection: draw again what is a copy when it is finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.guidance.mitigation import Mitigation
from memfree.guidance.similarity import Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class RejectAndResample(Mitigation):
    """Draws a sample again while it is a copy by the index's own calibrated threshold.

    Args:
        index: references, on the device of the samples.
        similarity: σ.
        threshold: a finished image with σ above it is rejected.
    """

    def __init__(self, index: ReferenceIndex, similarity: Similarity, threshold: float) -> None:
        self.index = index
        self.similarity = similarity
        self.threshold = threshold

    @torch.no_grad()
    def accept(self, images: Tensor) -> Tensor:
        """σ ≤ threshold of finished images (B, C, H, W), (B,) bool."""
        return self.similarity(self.index, images).sigma <= self.threshold
