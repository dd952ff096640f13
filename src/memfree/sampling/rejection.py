"""Reject and resample: the baseline that draws a sample again while it is a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memfree.sampling.loop import Result


def redraw(
    draw: Callable[[Tensor, int], Result],
    rejected: Callable[[Tensor], Tensor],
    count: int,
    budget: int,
) -> Result:
    """Draw a batch, and again what is rejected, until nothing is or the budget is spent.

    Args:
        draw: (positions (b,) in the batch, attempt number) → their samples.
        rejected: images (b, C, H, W) → (b,) bool.
        count: samples of the batch.
        budget: draws of a sample at most, the first included; the last is kept in any case.

    Returns:
        The accepted samples and the traces of their own attempts.
    """
    positions = torch.arange(count)
    result = draw(positions, 0)
    for attempt in range(1, budget):
        positions = positions[rejected(result.images[positions]).cpu()]
        if not len(positions):
            break
        again = draw(positions, attempt)
        result.images[positions] = again.images
        if result.trace is not None and again.trace is not None:
            _replace_rows(result.trace, again.trace, positions, count)
    return result


def _replace_rows(
    trace: dict[str, Tensor],
    again: dict[str, Tensor],
    positions: Sequence[int] | Tensor,
    count: int,
) -> None:
    """Overwrite the rows of ``positions`` at every step; rows are step by step."""
    for name, column in trace.items():
        if name != "sample":
            column.reshape(-1, count)[:, positions] = again[name].reshape(-1, len(positions))
