"""Split of a dataset into training, calibration, test and fit parts, and the sizes they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from memfree.data.random_streams import Stream, generator_of

MIN_EXPECTED = 5
"""Calibration images that must be expected above a false-positive rate's threshold."""
DEFAULT_RATE = 0.01
PartName = Literal["train", "calibration", "test", "fit"]
PARTS: tuple[PartName, ...] = get_args(PartName)


def too_few_images(images: int) -> str | None:
    """Error text if N calibration images do not allow the default false-positive rate."""
    needed = math.ceil(MIN_EXPECTED / DEFAULT_RATE - 1e-9)
    if images >= needed:
        return None
    line = (
        f"a false-positive rate of {100 * DEFAULT_RATE:g} % needs {needed} calibration images; "
        f"there {'is' if images == 1 else 'are'} {images}"
    )
    if images <= MIN_EXPECTED:
        return f"{line}, too few for any rate: prepare more with --parts.calibration"
    smallest = smallest_rate(images)
    return (
        f"{line}: the smallest rate is {100 * smallest:g} %, use "
        f"memfree evaluate --false_positive_rate {smallest:g} and "
        f"sample.py --mitigation.false_positive_rate {smallest:g}"
    )


def smallest_rate(images: int) -> float:
    """Smallest false-positive rate for N images, rounded up to be accepted."""
    return math.ceil(1e4 * MIN_EXPECTED / images - 1e-9) / 1e4


@dataclass(frozen=True)
class PartSizes:
    """How many source images each part takes: a number of 1 or more, or a share below 1.

    Defaults depend on the source: digits 500, 600, 500 and 197; CIFAR-10 50 000, 4 000, 4 000 and
    2 000; emoji 500, 500, 250 and the rest (with variants the rest, 500, 250 and 150); others 70,
    10, 10 and 10 %. What rounding leaves of the shares goes to train, if its size is a share.
    """

    train: float | None = None
    """Training images, before planned copies are added."""
    calibration: float | None = None
    """Held-out images for thresholds only."""
    test: float | None = None
    """Held-out images for rates, floors and distances."""
    fit: float | None = None
    """Held-out images for the classifier and a second embedding."""

    def counts(self, images: int, defaults: Sequence[float]) -> dict[PartName, int]:
        """Images of each part out of ``images``; ValueError if there are too few."""
        counts: dict[PartName, int] = {}
        shares: dict[PartName, float] = {}
        for name, default in zip(PARTS, defaults, strict=True):
            value = getattr(self, name)
            value = default if value is None else value
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"--parts.{name} {value:g}: use a whole number or a share below 1")
            if value < 1:
                shares[name] = value
            counts[name] = int(value) if value >= 1 else int(value * images + 1e-9)
        if shares.get("train"):
            rest = int(sum(shares.values()) * images + 1e-9) - sum(counts[name] for name in shares)
            counts["train"] += max(min(rest, images - sum(counts.values())), 0)
        if counts["train"] < 1:
            raise ValueError(f"--parts.train leaves no training image out of {images}")
        if sum(counts.values()) > images:
            wanted = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"the parts want {sum(counts.values())} images ({wanted}), "
                f"the source has {images}; lower --parts"
            )
        return counts


def deal(sizes: np.ndarray, counts: dict[PartName, int], seed: int) -> list[PartName | None]:
    """Give each group of ``sizes`` (G,) images to a part or to None, by ``counts`` of images.

    Groups are drawn at random until the counts are reached, then dealt from the largest down, each
    to a part drawn in proportion to its remaining room. Where no part has room the group stays out,
    and groups that were not drawn fill the gap; enough single images make the counts exact.
    """
    generator = generator_of(seed, Stream.SPLIT)
    order = generator.permutation(len(sizes))
    draws = generator.random(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    drawn = before < sum(counts.values())
    order = order[np.lexsort((np.where(drawn, -sizes[order], 0), ~drawn))]
    room = np.array([counts[name] for name in PARTS], np.int64)
    parts: list[PartName | None] = [None] * len(sizes)
    for number, draw in zip(order.tolist(), draws.tolist(), strict=True):
        open_room = np.where(room >= sizes[number], room, 0)
        total = int(open_room.sum())
        if total == 0:
            continue
        choice = int(np.searchsorted(open_room.cumsum(), draw * total, side="right"))
        room[choice] -= sizes[number]
        parts[number] = PARTS[choice]
    return parts


def limited(
    parts: list[PartName | None], sizes: np.ndarray, limit: int, seed: int
) -> list[PartName | None]:
    """Cut training groups to ``limit`` images in a seeded order; smaller limits keep subsets."""
    train = [number for number, part in enumerate(parts) if part == "train"]
    images = int(sum(sizes[number] for number in train))
    if limit > images:
        raise ValueError(f"--limit {limit}: there are {images} training images")
    generator = generator_of(seed, Stream.LIMIT)
    kept, room = list(parts), limit
    for position in generator.permutation(len(train)).tolist():
        number = train[position]
        if sizes[number] <= room:
            room -= int(sizes[number])
        else:
            kept[number] = None
    if room == limit:
        raise ValueError(f"--limit {limit}: every group of training images is larger")
    return kept
