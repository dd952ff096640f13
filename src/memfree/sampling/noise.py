"""Random numbers of one sample, from (seed, sample index) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generators(seed: int, indices: Sequence[int], attempt: int = 0) -> list[torch.Generator]:
    """One CPU generator a sample, seeded by (seed, index): no batch or rank changes its draws.

    Further attempts at the same sample (rejection) draw other numbers. torch's CPU generator keeps
    32 bits of a seed: among n samples, n²/2³³ pairs with the same noise are to be expected.
    """
    further = [attempt] if attempt else []
    return [seeded([seed, index, *further]) for index in indices]


def seeded(words: Sequence[int]) -> torch.Generator:
    """A CPU generator that depends on these whole numbers, at least 0, and on nothing else."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(shape: Sequence[int], sources: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (len(sources), *shape) float32, each row from its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


def initial_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise that the samples start from: the first draw of each sample's generator."""
    return draw(shape, generators(seed, indices))
