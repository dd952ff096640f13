"""Whole groups dealt out to parts."""

import numpy as np
import pytest

from memfree.data.split import PARTS, PartSizes, deal


def filled(sizes, parts):
    return {
        name: sum(int(size) for size, part in zip(sizes, parts, strict=True) if part == name)
        for name in PARTS
    }


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_met_exactly(seed):
    generator = np.random.default_rng(seed)
    sizes = np.concatenate([generator.integers(2, 9, 40), np.ones(60, int)])
    total = int(sizes.sum())
    counts = {"train": total - 110, "calibration": 60, "test": 40, "fit": 10}
    parts = deal(sizes, counts, seed)
    assert filled(sizes, parts) == counts
    assert parts == deal(sizes, counts, seed)
    assert parts != deal(sizes, counts, seed + 1)


def test_group_without_room_stays_out():
    parts = deal(np.array([5, 1, 1]), {"train": 2, "calibration": 0, "test": 0, "fit": 0}, 0)
    assert parts == [None, "train", "train"]


def test_groups_are_not_preferred_over_single_images():
    sizes = np.array([2] * 300 + [1] * 300)
    counts = {"train": 60, "calibration": 20, "test": 20, "fit": 0}
    parts = deal(sizes, counts, 0)
    assert filled(sizes, parts) == counts
    assert 20 < sum(part is not None for part in parts[:300]) < 46  # fair: a ninth of 300


def test_split_is_random():
    parts = deal(np.ones(400, int), {"train": 200, "calibration": 100, "test": 50, "fit": 50}, 3)
    assert 70 < sum(part == "train" for part in parts[:200]) < 130


def test_sizes_are_numbers_or_shares():
    defaults = (0.7, 0.1, 0.1, 0.1)
    assert list(PartSizes().counts(1000, defaults).values()) == [700, 100, 100, 100]
    sizes = PartSizes(train=300, fit=0).counts(1000, defaults)
    assert list(sizes.values()) == [300, 100, 100, 0]


@pytest.mark.parametrize(
    ("sizes", "images", "expected"),
    [
        (PartSizes(), 79, [58, 7, 7, 7]),
        (PartSizes(), 9, [9, 0, 0, 0]),
        (PartSizes(train=0.5), 79, [42, 7, 7, 7]),  # 0.8 of 79 are 63
        (PartSizes(calibration=0), 79, [57, 0, 7, 7]),  # 0.9 of 79 are 71
        (PartSizes(train=50), 79, [50, 7, 7, 7]),
        (PartSizes(fit=9), 79, [56, 7, 7, 9]),
    ],
)
def test_what_rounding_leaves_goes_to_train(sizes, images, expected):
    assert list(sizes.counts(images, (0.7, 0.1, 0.1, 0.1)).values()) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (PartSizes(train=900), "the parts want 1200 images"),
        (PartSizes(train=0), "--parts.train leaves no training image"),
        (PartSizes(test=-1), "--parts.test -1"),
        (PartSizes(test=1.5), "--parts.test 1.5"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sizes.counts(1000, (0.7, 0.1, 0.1, 0.1))
