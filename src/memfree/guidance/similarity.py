"""Similarity σ_t of an image to its nearest training image (eq. 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from memfree.conditions import SAME

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


SMALLEST_DISTANCE = 2.0**-24
"""Stands for a mean of 0 in eq. 8; less than float32 resolves in [−1, 1]."""


@dataclass(frozen=True)
class Match:
    """A batch beside its nearest references; σ is higher for nearer and differentiable."""

    sigma: Tensor  # (B,) float32
    rows: Tensor  # (B, k) int64 rows of the index, nearest first, each of another group
    vectors: Tensor  # (B, D): the search vectors, without gradient, to search further neighbours


class Similarity(Protocol):
    """σ of images against an index; differentiable in the images, not through the search."""

    name: str

    def __call__(self, index: ReferenceIndex, images: Tensor) -> Match:
        """Match images (B, C, H, W) in [−1, 1]; searches the index."""
        ...

    def against(self, index: ReferenceIndex, images: Tensor, rows: Tensor) -> Tensor:
        """σ (B,) against given rows (B, k), without a search."""
        ...

    def strength(self, sigma: Tensor, threshold: Tensor) -> Tensor:
        """What c_1 and c_2 multiply in eq. 13 and 15, (B,); ≥ 0 for active samples."""
        ...


class NormalizedL2:
    """Pixel similarity nL2 (eq. 8): σ = −ℓ2(x̂_0, n_0) / (α · mean ℓ2 to the k nearest groups).

    The paper has k = 50 and α = 0.5; its code and the default do not differentiate the denominator.
    """

    def __init__(self, k: int = 50, alpha: float = 0.5, differentiate_mean: bool = False) -> None:
        self.k = k
        self.alpha = alpha
        self.differentiate_mean = differentiate_mean
        self.name = f"nl2-k{k}-a{alpha:g}"

    def __call__(self, index: ReferenceIndex, images: Tensor) -> Match:
        """Match images (B, C, H, W) in [−1, 1]; the index needs k groups."""
        features = index.features(images)
        vectors = features.detach()
        hits = index.search(vectors, self.k)
        if not features.requires_grad:
            # The search's own distances are exact: no need to gather again.
            return Match(_nl2(hits.scores[:, 0], hits.scores, self.alpha), hits.rows, vectors)
        return Match(self._differentiable(index, features, hits.rows), hits.rows, vectors)

    def against(self, index: ReferenceIndex, images: Tensor, rows: Tensor) -> Tensor:
        """σ (B,) against given rows (B, k): the first is n_0, all are the denominator."""
        return self._differentiable(index, index.features(images), rows)

    def _differentiable(self, index: ReferenceIndex, features: Tensor, rows: Tensor) -> Tensor:
        references = index.vectors[rows.to(index.vectors.device)].to(features)  # (B, k, D)
        apart = features - references[:, 0]
        nearest = torch.linalg.vector_norm(apart, dim=1)
        # A norm has no gradient at 0: on top of n_0 any direction leads away, and this one leads
        # towards the other neighbours.
        towards = _unit((references[:, 1:] - references[:, :1]).sum(dim=1))
        nearest = torch.where(nearest == 0, (apart * towards).sum(dim=1), nearest)
        spread = features if self.differentiate_mean else features.detach()
        all_k = torch.linalg.vector_norm(spread[:, None] - references, dim=2)
        return _nl2(nearest, all_k, self.alpha)

    def strength(self, sigma: Tensor, threshold: Tensor) -> Tensor:
        """Excess of σ over the gate: σ of eq. 8 is never positive, so c·σ would be 0."""
        return (sigma - threshold).clamp(min=0)


def _nl2(nearest: Tensor, all_k: Tensor, alpha: float) -> Tensor:
    """Eq. 8 from distances; an image equal to all k references counts as σ = 0."""
    return -nearest / (alpha * all_k.mean(dim=1)).clamp(min=SMALLEST_DISTANCE)


class EmbeddingSimilarity:
    """Object similarity (eq. 9): σ = E(x̂_0)ᵀ E(n_0) with an L2-normalised embedding E."""

    name = "cosine"

    def __call__(self, index: ReferenceIndex, images: Tensor) -> Match:
        """Match images (B, C, H, W) in [−1, 1]."""
        features = index.features(images)
        vectors = features.detach()
        hits = index.search(vectors, 1)
        if not features.requires_grad:
            return Match(hits.scores[:, 0], hits.rows, vectors)
        return Match(_cosine(index, features, hits.rows), hits.rows, vectors)

    def against(self, index: ReferenceIndex, images: Tensor, rows: Tensor) -> Tensor:
        """σ (B,) against the first of the given rows (B, k)."""
        return _cosine(index, index.features(images), rows)

    def strength(self, sigma: Tensor, threshold: Tensor) -> Tensor:
        """σ itself, as eq. 13 and 15 have it."""
        return sigma.clamp(min=0)


def _cosine(index: ReferenceIndex, features: Tensor, rows: Tensor) -> Tensor:
    nearest = index.vectors[rows[:, 0].to(index.vectors.device)].to(features)
    cosine = (features * nearest).sum(dim=1)
    # A cosine has its maximum, and no gradient, at the same vector: there any direction leads away.
    towards = (features * _unit(torch.zeros_like(nearest))).sum(dim=1)
    return torch.where(cosine > SAME, cosine.detach() - (towards - towards.detach()), cosine)


def _unit(directions: Tensor) -> Tensor:
    """Directions (n, D) of length 1; a fixed one that looks random replaces a zero."""
    number = torch.arange(1, directions.shape[1] + 1, device=directions.device)
    anywhere = (number.to(directions) ** 2).cos()
    zero = (directions == 0).all(dim=1, keepdim=True)
    return torch.nn.functional.normalize(torch.where(zero, anywhere, directions), dim=1)
