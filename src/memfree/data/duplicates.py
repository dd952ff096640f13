"""Duplicate detection: exact and near duplicates of a source, before it is split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from memfree.data.options import DEFAULT_DISTANCE
from memfree.full_precision import full_precision

_GRID = 16  # side of the windows that are compared; smaller images are compared as they are
_RANK = 32  # dimensions of the projection that rules most pairs out
_FLAT = 4.0  # grey levels of contrast below which a picture counts as featureless
_BLOCK = 1024  # images a block of the pair search
_SLACK = 1e-4  # what float32 may lose in a squared distance of unit vectors


def numbered(names: Iterable[Hashable]) -> np.ndarray:
    """Number names by first appearance, (N,) int64."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def distinct(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 number of each image (N, ...) uint8 by content, (M,) int64 first positions."""
    number = numbered(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return number, np.unique(number, return_index=True)[1]


@full_precision(torch.device("cpu"))
def near_pairs(
    pixels: np.ndarray,
    distance: float = DEFAULT_DISTANCE,
    progress: Callable[[int, int], None] | None = None,
    since: int = 0,
) -> np.ndarray:
    """(P, 2) int64 sorted pairs of images that differ only by a flip, a shift or brightness.

    The centre of one, without a border of a pixel (1/32 of the side in larger pictures), is
    compared with the nine windows of that size in the other and in its mirror image. Windows are
    shrunk to at most 16 x 16 pixels, each channel is centred and the whole scaled to unit length,
    which removes brightness, contrast and colour casts. The distance is the smallest Euclidean one
    of the 18: 0 for the same picture, sqrt(2) for unrelated ones, 0.15 for a correlation of 0.989.
    At 0.15, 9 of the 1.6 million pairs of the 1797 digits are near duplicates; JPEG and a fifth
    more or less brightness stay below. Featureless pictures (contrast below about 4 grey levels)
    all match each other.

    The search is exact: projecting onto the 32 strongest directions can only shorten a distance.
    Time grows with N² (a minute on one core for 60 000 colour images), memory with N. ``pixels``:
    (N, C, H, W) uint8, may be memory-mapped; ``distance``: 0 finds none; ``progress`` receives
    (images done, N); ``since``: only pairs whose later image has at least this number.
    """
    if distance <= 0 or len(pixels) < 2:
        return np.empty((0, 2), np.int64)
    basis = _basis(pixels)
    projected = [
        [_as_right(window @ basis) for window in _windows(block)]
        for block in _blocks(pixels[since:])
    ]
    targets = [torch.cat(windows) for windows in zip(*projected, strict=True)]
    queries = torch.cat([_as_left(_centre(block) @ basis) for block in _blocks(pixels)])
    found = []
    for start in range(0, len(pixels), _BLOCK):
        candidates = _candidates(queries, targets, start, since, distance**2 + _SLACK)
        found.append(candidates[_exact(pixels, candidates) <= distance])
        if progress is not None:
            progress(min(start + _BLOCK, len(pixels)), len(pixels))
    return torch.cat(found).numpy()


def group(count: int, pairs: np.ndarray, declared: Sequence[Hashable | None] = ()) -> np.ndarray:
    """(count,) int64 connected groups, numbered by first appearance.

    ``pairs`` (P, 2) belong together, as do images with the same ``declared`` name other than None.
    """
    leader: dict[Hashable, int] = {}
    same = [
        (leader.setdefault(name, row), row) for row, name in enumerate(declared) if name is not None
    ]
    links = np.concatenate([pairs.reshape(-1, 2), np.array(same, np.int64).reshape(-1, 2)])
    graph = coo_matrix((np.ones(len(links), bool), (links[:, 0], links[:, 1])), (count, count))
    return numbered(connected_components(graph, directed=False)[1].tolist())


def _blocks(pixels: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(pixels), _BLOCK):
        yield torch.from_numpy(np.array(pixels[start : start + _BLOCK])).float()


def _border(images: torch.Tensor) -> tuple[int, int]:
    height, width = (max(1, round(side / 32)) if side > 4 else 0 for side in images.shape[2:])
    return height, width


def _unit(images: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) to centred unit vectors (N, D); featureless ones stay near zero."""
    flat = (images - images.mean((2, 3), keepdim=True)).flatten(1)
    least = _FLAT * flat.shape[1] ** 0.5
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=least)


def _shrunk(images: torch.Tensor) -> torch.Tensor:
    rows, columns = (_areas(side).to(images) for side in images.shape[2:])
    return rows @ images @ columns.T


def _areas(side: int) -> torch.Tensor:
    """(n, side) weights of the pixels of a line in n equal lengths of it."""
    count = min(side, _GRID)
    edges = torch.linspace(0, side, count + 1, dtype=torch.float64)
    pixel = torch.arange(side, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return overlap.clamp(min=0) * (count / side)


def _centre(images: torch.Tensor) -> torch.Tensor:
    top, left = _border(images)
    height, width = images.shape[2:]
    return _unit(_shrunk(images[:, :, top : height - top, left : width - left]))


def _windows(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Unit vectors (N, D) of the nine windows of the centre's size, each also mirrored."""
    top, left = _border(images)
    height, width = images.shape[2] - 2 * top, images.shape[3] - 2 * left
    for y in sorted({0, top, 2 * top}):
        for x in sorted({0, left, 2 * left}):
            window = _shrunk(images[:, :, y : y + height, x : x + width])
            yield _unit(window)
            yield _unit(window.flip(-1))


def _basis(pixels: np.ndarray) -> torch.Tensor:
    """(D, r) orthonormal directions in which the pictures differ most."""
    scatter: torch.Tensor | float = 0.0
    for block in _blocks(pixels):
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
    queries: torch.Tensor, targets: Sequence[torch.Tensor], start: int, since: int, limit: float
) -> torch.Tensor:
    """Pairs (i, j > i) of one block whose projections are within sqrt(limit) of each other."""
    block = queries[start : start + _BLOCK]
    begin = max(start, since)
    best = block @ targets[0][begin - since :].T
    scores = torch.empty_like(best)
    for target in targets[1:]:
        torch.mm(block, target[begin - since :].T, out=scores)
        torch.maximum(best, scores, out=best)
    pairs = (best >= -limit / 2).nonzero() + torch.tensor([start, begin])
    return pairs[pairs[:, 1] > pairs[:, 0]]


def _exact(pixels: np.ndarray, pairs: torch.Tensor) -> torch.Tensor:
    """(P,) distances of the pairs, in float64."""
    parts = []
    for part in pairs.split(_BLOCK):
        first, second = (
            torch.from_numpy(np.array(pixels[part[:, side].numpy()])).double() for side in (0, 1)
        )
        centre = _centre(first)
        distances = [(centre - window).norm(dim=1) for window in _windows(second)]
        parts.append(torch.stack(distances).amin(0))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
