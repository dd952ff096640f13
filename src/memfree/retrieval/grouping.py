"""Groups of an index: exact copies by content, near copies by pixels, declared groups."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from memfree.full_precision import full_precision

NEAR_RMS = 0.03
"""Largest root mean square difference of near copies, for pixels in [-1, 1]: 4 of 255 grey levels,
what JPEG at quality 90 does."""
NEAR_CONTRAST = 0.1
"""The same relative to the weaker image's own standard deviation, so that two different dark or
flat images are not called copies."""


def content_hashes(images: Tensor) -> list[str]:
    """SHA-256 of every image's float32 values, for images (N, C, H, W); −0 counts as 0."""
    values = (images.detach().to("cpu", torch.float32) + 0.0).flatten(1).numpy()
    return [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest() for row in values]


def numbered(names: Sequence[object]) -> np.ndarray:
    """Number names by first appearance: (N,) int64."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def joined(count: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components of ``count`` nodes under ``pairs`` (P, 2), by first appearance."""
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    return numbered(labels.tolist())


def joined_by_copies(row: np.ndarray, names: Sequence[object]) -> np.ndarray:
    """Group of every row (rows,), where an image that has copies joins all their groups.

    Args:
        row: (N,) row of every image; identical images share one.
        names: N declared group names.
    """
    declared = numbered(names)
    rows, groups = int(row.max()) + 1, int(declared.max()) + 1
    # A graph of rows and declared groups: an edge says that an image of the row is in the group.
    edges = np.unique(np.stack([row, declared + rows], axis=1), axis=0)
    return numbered(joined(rows + groups, edges)[:rows].tolist())


@full_precision(torch.device("cpu"))
def near_copies(images: Tensor, first: int | None = None) -> np.ndarray:
    """Pairs (P, 2) of images so alike in pixels that they are one picture stored twice.

    Two images are near copies if they differ by at most ``NEAR_RMS`` and by at most
    ``NEAR_CONTRAST`` of the weaker one's standard deviation: recompression, a faint change of
    brightness, resampling noise. Shifts, crops and flips are *not* found: in pixels they are
    further from their original than other images are, so such copies must be declared.

    All pairs are compared in a few principal directions first. A projection never increases a
    distance, so no pair is lost, and few are left to be compared in full.

    Args:
        images: (N, C, H, W) distinct images in [-1, 1].
        first: look only for pairs with one of so many leading images; None: for all pairs.
    """
    vectors = images.detach().to("cpu", torch.float32).flatten(1)
    count, dimension = vectors.shape
    radius = (
        torch.minimum(
            torch.tensor(NEAR_RMS, dtype=torch.float32),
            NEAR_CONTRAST * vectors.std(1, correction=0),
        )
        * dimension**0.5
    )  # (N,)
    basis = _principal_directions(vectors[:: max(1, count // 1000)])
    short = (vectors - vectors.mean(0)) @ basis
    found = [np.zeros((0, 2), dtype=np.int64)]
    squares = short.square().sum(1)
    # Slack for the rounding of expanded squares in float32.
    limit = radius.square() * 1.001 + 1e-5 * squares.max() - squares
    for rows in torch.arange(count if first is None else first).split(256):
        later = slice(int(rows[0]), None)
        apart = torch.addmm(squares[later], short[rows], short[later].T, alpha=-2)
        one, other = torch.nonzero(apart <= limit[rows, None], as_tuple=True)
        one, other = one + rows[0], other + rows[0]
        one, other = one[one < other], other[one < other]
        for part in torch.arange(len(one)).split(max(1, (1 << 24) // dimension)):
            a, b = one[part], other[part]
            distance = torch.linalg.vector_norm(vectors[a] - vectors[b], dim=1)
            keep = distance <= torch.minimum(radius[a], radius[b])
            found.append(torch.stack([a[keep], b[keep]], dim=1).numpy())
    return np.concatenate(found)


def _principal_directions(sample: Tensor, count: int = 32) -> Tensor:
    """Orthonormal directions (D, ≤ count) of the largest variance of a sample (n, D)."""
    centred = (sample - sample.mean(0)).to(torch.float64)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return directions[:count].T.to(torch.float32)
