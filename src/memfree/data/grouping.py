"""Exact and near duplicates of a source, found by content before anything is split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

DEFAULT_DISTANCE = 0.15
"""Two images are near duplicates up to this distance; see :func:`near_pairs`."""

_GRID = 16  # side of the thumbnail that is compared; smaller images are compared as they are
_RANK = 32  # dimensions of the projection that rules most pairs out
_FLAT = 4.0  # grey levels of contrast below which a picture counts as featureless
_BLOCK = 1024  # images a block of the pair search
_SLACK = 1e-4  # what float32 may lose in a squared distance of unit vectors


def distinct(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number exact duplicates alike.

    Args:
        pixels: (N, ...) uint8.

    Returns:
        (N,) int64: number of the distinct image that each one is, in order of first appearance;
        and (M,) int64: where each distinct image appears first.
    """
    seen: dict[bytes, int] = {}
    of = np.empty(len(pixels), np.int64)
    first: list[int] = []
    for row, image in enumerate(pixels):
        digest = hashlib.sha256(image.tobytes()).digest()
        number = seen.setdefault(digest, len(seen))
        if number == len(first):
            first.append(row)
        of[row] = number
    return of, np.array(first, np.int64)


def near_pairs(
    pixels: np.ndarray,
    distance: float = DEFAULT_DISTANCE,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Pairs of images that are the same picture but for a flip, a shift or its brightness.

    Both are shrunk to 16 x 16 pixels (smaller ones stay). The centre of one, without its border of
    one pixel, is compared with the nine windows of that size in the other, and in the other
    mirrored. Each window is centred (over all channels together) and scaled to unit length, which
    removes brightness and contrast but keeps colour. The distance is the smallest Euclidean one
    among the 18: 0 for the same picture, sqrt(2) for unrelated ones; 0.15 is a correlation of
    0.989. At 0.15, of the 1.6 million pairs among the 1797 digits 9 are taken for near duplicates;
    JPEG and a change of brightness by a fifth stay below it.

    The search is exact and in blocks: a projection to the 32 strongest directions can only shorten
    a distance, so what it leaves apart needs no further look. Work grows with the square of N
    (about two minutes for 60 000 on two cores), memory with N.

    Args:
        pixels: (N, C, H, W) uint8, may be memory-mapped.
        distance: the largest distance of near duplicates; 0 finds none.
        progress: called with (images done, N).

    Returns:
        (P, 2) int64 pairs of row numbers, the smaller first, sorted.
    """
    if distance <= 0 or len(pixels) < 2:
        return np.empty((0, 2), np.int64)
    thumbnails = _thumbnails(pixels)
    basis = _basis(thumbnails)
    queries = torch.cat([_as_left(_centre(block) @ basis) for block in thumbnails.split(_BLOCK)])
    targets = [
        torch.cat([_as_right(window(block) @ basis) for block in thumbnails.split(_BLOCK)])
        for window in _windows(thumbnails.shape[2:])
    ]
    found = []
    for start in range(0, len(pixels), _BLOCK):
        candidates = _candidates(queries, targets, start, distance**2 + _SLACK)
        found.append(candidates[_exact(thumbnails, candidates) <= distance])
        if progress is not None:
            progress(min(start + _BLOCK, len(pixels)), len(pixels))
    return torch.cat(found).numpy()


def group(count: int, pairs: np.ndarray, declared: Sequence[str | None]) -> np.ndarray:
    """Connected groups.

    Args:
        count: number of images.
        pairs: (P, 2) images that belong together.
        declared: (count,) names; images with the same name belong together.

    Returns:
        (count,) int64 group numbers, in order of first appearance.
    """
    leader: dict[str, int] = {}
    same = [
        (leader.setdefault(name, row), row) for row, name in enumerate(declared) if name is not None
    ]
    links = np.concatenate([pairs.reshape(-1, 2), np.array(same, np.int64).reshape(-1, 2)])
    graph = coo_matrix((np.ones(len(links), bool), (links[:, 0], links[:, 1])), (count, count))
    labels = connected_components(graph, directed=False)[1]
    order: dict[int, int] = {}
    return np.array([order.setdefault(label, len(order)) for label in labels.tolist()], np.int64)


def _thumbnails(pixels: np.ndarray) -> torch.Tensor:
    """(N, C, h, w) float32 in 0..255, h and w at most 16."""
    height, width = (min(side, _GRID) for side in pixels.shape[2:])
    out = torch.empty(len(pixels), pixels.shape[1], height, width)
    for start in range(0, len(pixels), _BLOCK):
        block = torch.from_numpy(np.array(pixels[start : start + _BLOCK])).float()
        out[start : start + _BLOCK] = torch.nn.functional.adaptive_avg_pool2d(
            block, (height, width)
        )
    return out


def _border(size: Sequence[int]) -> tuple[int, int]:
    """Pixels left out at the top and the left: none where a picture is too small for it."""
    return tuple(int(side > 4) for side in size)  # type: ignore[return-value]


def _unit(windows: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) to centred unit vectors (N, D); featureless ones stay near zero."""
    flat = windows.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    least = _FLAT * flat.shape[1] ** 0.5
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=least)


def _centre(thumbnails: torch.Tensor) -> torch.Tensor:
    top, left = _border(thumbnails.shape[2:])
    height, width = thumbnails.shape[2:]
    return _unit(thumbnails[:, :, top : height - top, left : width - left])


def _windows(size: Sequence[int]) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Functions from thumbnails to the unit vectors of each window, as they are and mirrored."""
    top, left = _border(size)
    height, width = size[0] - 2 * top, size[1] - 2 * left
    for mirrored in (False, True):
        for y in range(2 * top + 1):
            for x in range(2 * left + 1):

                def window(
                    thumbnails: torch.Tensor, mirrored: bool = mirrored, y: int = y, x: int = x
                ) -> torch.Tensor:
                    images = thumbnails.flip(-1) if mirrored else thumbnails
                    return _unit(images[:, :, y : y + height, x : x + width])

                yield window


def _basis(thumbnails: torch.Tensor) -> torch.Tensor:
    """(D, r) orthonormal directions in which the pictures differ most."""
    scatter: torch.Tensor | float = 0.0
    for block in thumbnails.split(_BLOCK):
        centres = _centre(block).double()
        scatter = scatter + centres.T @ centres
    assert isinstance(scatter, torch.Tensor)
    return torch.linalg.eigh(scatter)[1][:, -_RANK:].float()


def _as_left(vectors: torch.Tensor) -> torch.Tensor:
    """[a, |a|², 1], so that one product with :func:`_as_right` is -|a - b|²/2."""
    squares = vectors.square().sum(1, keepdim=True)
    return torch.cat([vectors, squares, torch.ones_like(squares)], 1)


def _as_right(vectors: torch.Tensor) -> torch.Tensor:
    """[b, -1/2, -|b|²/2]."""
    squares = vectors.square().sum(1, keepdim=True)
    return torch.cat([vectors, torch.full_like(squares, -0.5), squares / -2], 1)


def _candidates(
    queries: torch.Tensor, targets: Sequence[torch.Tensor], start: int, limit: float
) -> torch.Tensor:
    """Pairs (i, j > i) of one block whose projections are within sqrt(limit) of each other."""
    block = queries[start : start + _BLOCK]
    best = block @ targets[0][start:].T
    scores = torch.empty_like(best)
    for target in targets[1:]:
        torch.mm(block, target[start:].T, out=scores)
        torch.maximum(best, scores, out=best)
    pairs = (best >= -limit / 2).nonzero()
    return pairs[pairs[:, 1] > pairs[:, 0]] + start


def _exact(thumbnails: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """(P,) distances of the pairs, in float64."""
    parts = []
    for part in pairs.split(_BLOCK):
        queries = _centre(thumbnails[part[:, 0]].double())
        others = thumbnails[part[:, 1]].double()
        distances = [
            (queries - window(others)).norm(dim=1) for window in _windows(thumbnails.shape[2:])
        ]
        parts.append(torch.stack(distances).amin(0))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
