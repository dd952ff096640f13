"""What AMG remembers of a sample that a repeated image called: how near it was, and to what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match


@dataclass(frozen=True)
class Call:
    """A batch beside its nearest images, and how often the model saw those under the prompts."""

    match: Match
    records: Tensor
    """(B,): m(y) of each nearest image."""


def nearest_call(prediction: Prediction, owner: object, call: Call, called: Tensor) -> Call:
    """The call of each sample at its highest σ among the steps at which it was called.

    Caption deduplication then keeps its caption to the end: that of the image that was left
    behind, not of whichever is nearest now.

    Args:
        prediction: its memory keeps the call from step to step.
        owner: the guidance whose latch this is.
        call: σ, the neighbours and their records at this step.
        called: (B,) bool: whose gate is opened by a repeated image at this step.

    Returns:
        The call, its σ −∞ for samples that were never called.
    """
    key = (owner, "nearest call")
    never = torch.full_like(call.match.sigma, -torch.inf)
    before = prediction.memory.get(
        key, Call(Match(never, call.match.rows, call.match.vectors), call.records)
    )
    prediction.memory[key] = where(called & (call.match.sigma > before.match.sigma), call, before)
    return prediction.memory[key]


def where(mask: Tensor, call: Call, other: Call) -> Call:
    """The rows of one call where ``mask`` (B,) is true, those of another elsewhere."""
    one, two, rows = call.match, other.match, mask[:, None]
    return Call(
        Match(
            torch.where(mask, one.sigma, two.sigma),
            torch.where(rows, one.rows, two.rows),
            torch.where(rows, one.vectors, two.vectors),
        ),
        torch.where(mask, call.records, other.records),
    )
