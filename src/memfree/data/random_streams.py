"""Random generators: what each seed is used for, by numbers that never change.

A draw depends on its seed and numbers, never on other draws: add streams, never renumber or reorder
them. No torch import, for ``--help``.
"""

from __future__ import annotations

import random
from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@unique
class Stream(IntEnum):
    """Uses of the seed of a dataset, a duplication plan or a training."""

    DISTINCT_IMAGES = 0  # order of the distinct images in a short training (embedding, CLIP)
    SPLIT = 1  # which groups go to which part
    REPEATED_IMAGES = 2  # which images a plan repeats
    COPY = 3  # how a copy is changed
    SOURCE_ORDER = 4  # order of the source's images within each part
    RECORD_ORDER = 5  # order of the training records, copies among them
    CONDITIONS = 6  # labels and captions of copies
    EPOCH = 7  # order of a dataset folder's records in an epoch
    FLIPS = 8  # which of these records are mirrored
    STREAMED_FLIPS = 9  # which records of streamed shards are mirrored
    SHARDS = 10  # order of streamed shards
    WORD = 11  # a made-up word of policy ``key``
    LABELS = 12  # labels that are drawn instead of the source's
    LIMIT = 13  # which groups of training images a limit keeps
    VALIDATION = 14  # noise of an image in validation; its row stands in the place of the seed


@unique
class EvaluationStream(IntEnum):
    """Uses of an evaluation's seed, an option of its own; numbers may equal those of ``Stream``."""

    # Rows of larger sets of features. numpy fills up with zeros: resampling (``intervals``), which
    # has no number of its own, sees the same numbers.
    ROWS = 0
    SUBSETS = 1  # subsets whose distances are averaged
    SUBSAMPLES = 2  # smaller subsets, from whose spread that of the whole is estimated
    SHUFFLED_CAPTIONS = 3  # captions of other images; also of the test pairs of a CLIP


@unique
class GuardStream(IntEnum):
    """Uses of a guarded pipeline's seed, per image and attempt."""

    REDRAW = 0  # another draw's noise
    MITIGATION = 1  # a mitigation's own draws


def generator_of(*words: int) -> np.random.Generator:
    """Numpy generator of a seed and other whole numbers >= 0, one of them a stream."""
    return np.random.Generator(np.random.PCG64(list(words)))


def torch_generator(*words: int) -> torch.Generator:
    """CPU generator of these whole numbers >= 0."""
    import torch

    return torch.Generator().manual_seed(_first_word(words))


def step_seed(*words: int) -> int:
    """63-bit seed of all that a training step draws, from whole numbers >= 0."""
    return _first_word(words) >> 1


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Generator of all that one step of a short training draws."""
    import torch

    return torch.Generator(device).manual_seed(step_seed(seed, step))


def autoencoder_step_generator(seed: int, step: int) -> torch.Generator:
    """CPU generator of one autoencoder step; seeds would overlap after a million steps."""
    import torch

    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def buffer_random(seed: int, epoch: int, turn: int, unit: int) -> random.Random:
    """Python generator of the order in a shuffle buffer, for webdataset."""
    return random.Random(f"{seed} {epoch} {turn} {unit}")


def _first_word(words: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0])
