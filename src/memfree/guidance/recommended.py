"""Recommended settings of AMG by what σ is made of; docs/method.md says how they were chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex

PIXELS: dict[str, float | bool] = {
    "start_ratio": 1.4,
    "gate_margin": 0.1,
    "margin_per_doubling": 0.0,
    "max_displacement": 1.0,
    "least_scale": 1.0,
    "latched": False,
}
"""For ``NormalizedL2``, whose σ is a negative distance: 0 for the same image."""
EMBEDDINGS: dict[str, float | bool] = {
    "start_ratio": 1.16,
    "gate_margin": 0.05,
    "margin_per_doubling": 0.05,
    "max_displacement": 0.6,
    "least_scale": 0.0,
    "latched": True,
}
"""For ``EmbeddingSimilarity``, a cosine: 1 for the same image."""
EMBEDDINGS_ALONE: dict[str, float | bool] = {**EMBEDDINGS, "max_displacement": 2.0}
"""The same for AMG by itself: without multiplicity guidance, G_sim has to choose another picture,
and a short step only puts a pattern on the memorized one that the embedding takes for a change."""


def recommended(index: ReferenceIndex, alone: bool) -> dict[str, float | bool]:
    """The recommended settings for the default similarity of an index.

    Args:
        index: the references.
        alone: whether AMG acts without multiplicity guidance.
    """
    if index.metric == "l2":
        return PIXELS
    return EMBEDDINGS_ALONE if alone else EMBEDDINGS
