"""What a duplication plan chooses and how its copies look."""

from collections import Counter

import numpy as np
import pytest

from memfree.data import DuplicationPlan


def test_count_and_share_choose_the_same_by_seed():
    by_count = DuplicationPlan(images=10, factor=8).factors(range(200), None)
    by_share = DuplicationPlan(images=0.05, factor=8).factors(range(200), None)
    assert by_count == by_share
    assert len(by_count) == 10 and set(by_count.values()) == {8}
    assert by_count != DuplicationPlan(images=10, factor=8, seed=1).factors(range(200), None)


def test_ladder_gives_each_factor_its_images():
    plan = DuplicationPlan(ladder=[1, 2, 4, 64], images_per_factor=5)
    assert Counter(plan.factors(range(50), None).values()) == {1: 5, 2: 5, 4: 5, 64: 5}


def test_balanced_choice_takes_turns():
    labels = [0] * 90 + [1] * 30 + [2] * 5
    plan = DuplicationPlan(images=12, factor=2, choice="balanced")
    assert Counter(labels[i] for i in plan.factors(range(125), labels)) == {0: 4, 1: 4, 2: 4}
    with pytest.raises(ValueError, match="needs a source with classes"):
        plan.factors(range(125), None)


def test_empty_plan():
    assert DuplicationPlan().factors(range(5), None) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 5}, "needs --plan.factor"),
        ({"factor": 5}, "needs --plan.factor"),
        ({"images": 5, "factor": 0}, "1 or more"),
        ({"images": -1, "factor": 2}, "--plan.images -1"),
        ({"images": 2.5, "factor": 2}, "--plan.images 2.5"),
        ({"images": 5, "factor": 2, "ladder": [2], "images_per_factor": 1}, "not both"),
        ({"ladder": [2]}, "need each other"),
        ({"kinds": []}, "--plan.kinds is empty"),
        ({"crop": 1.0}, "between 0 and 1"),
        ({"jpeg_quality": (90, 10)}, "--plan.jpeg_quality"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DuplicationPlan(**arguments)


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match="wants to repeat 6 images, but only 5"):
        DuplicationPlan(images=6, factor=2).factors(range(5), None)
    with pytest.raises(ValueError, match="is none"):
        DuplicationPlan(images=0.01, factor=2).factors(range(5), None)


@pytest.fixture
def picture():
    rows = np.arange(16, dtype=np.uint8)
    return np.stack([rows[:, None] * 8 + rows[None, :] * 2 + c for c in (0, 40, 80)])


def copies(picture, kind, count=8, **arguments):
    plan = DuplicationPlan(images=1, factor=count + 1, kinds=[kind], **arguments)
    return [plan.copy(picture, 7, number) for number in range(1, count + 1)]


def test_exact_and_flipped_copies(picture):
    assert all((copy == picture).all() for copy in copies(picture, "exact"))
    kinds = {copy.tobytes() for copy in copies(picture, "flip", 30)}
    assert kinds == {picture.tobytes(), picture[:, :, ::-1].tobytes()}


def test_brightness_scales(picture):
    for copy in copies(picture, "brightness", brightness=0.3):
        scale = float(copy[0, 1:].sum() / picture[0, 1:].sum())  # this channel is never cut off
        assert 0.69 < scale < 1.31
        assert np.abs(copy - np.minimum(picture * scale, 255)).max() < 1.5


def test_crops_are_windows(picture):
    made = copies(picture, "crop", 20)
    assert len({copy.tobytes() for copy in made}) > 5
    assert all(copy.shape == picture.shape and copy.dtype == np.uint8 for copy in made)
    # the corner is that of one of the 3 x 3 windows of 14 x 14
    corners = {int(picture[0, y, x]) for y in range(3) for x in range(3)}
    assert {int(copy[0, 0, 0]) for copy in made} <= corners


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_jpeg_stays_near(picture, channels):
    pixels = np.concatenate([picture, picture[:1]])[:channels]
    for copy in copies(pixels, "jpeg"):
        assert copy.shape == pixels.shape
        assert 0 < np.abs(copy.astype(int) - pixels).mean() < 8
        if channels in (2, 4):
            assert (copy[-1] == pixels[-1]).all()


def test_copies_depend_on_seed_image_and_number(picture):
    plan = DuplicationPlan(images=1, factor=2, kinds=["crop", "flip", "brightness", "jpeg"])
    again = [plan.copy(picture, 3, number).tobytes() for number in range(12)]
    assert again == [plan.copy(picture, 3, number).tobytes() for number in range(12)]
    assert again != [plan.copy(picture, 4, number).tobytes() for number in range(12)]
    assert len(set(again)) > 4
