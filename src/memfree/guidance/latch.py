"""What AMG remembers of a sample that a repeated image called: how near it was, and to what."""

from __future__ import annotations

import torch
from torch import Tensor

from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match


def nearest_call(prediction: Prediction, owner: object, match: Match, called: Tensor) -> Match:
    """The match of each sample at its highest σ among the steps at which it was called.

    Despecification then keeps its strength to the end, and caption deduplication its caption:
    that of the image that was left behind, not of whichever is nearest now.

    Args:
        prediction: its memory keeps the match from step to step.
        owner: the guidance whose latch this is.
        match: σ and the neighbours of this step.
        called: (B,) bool: whose gate is opened by a repeated image at this step.

    Returns:
        The match, its σ −∞ for samples that were never called.
    """
    key = (owner, "nearest call")
    never = Match(torch.full_like(match.sigma, -torch.inf), match.rows, match.vectors)
    before = prediction.memory.get(key, never)
    prediction.memory[key] = chosen(called & (match.sigma > before.sigma), match, before)
    return prediction.memory[key]


def chosen(first: Tensor, one: Match, other: Match) -> Match:
    """The rows of one match where ``first`` (B,), of another elsewhere."""
    return Match(
        torch.where(first, one.sigma, other.sigma),
        torch.where(first[:, None], one.rows, other.rows),
        torch.where(first[:, None], one.vectors, other.vectors),
    )
