"""Near duplicates found by content, against brute force in float64."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_image

from memfree.data import duplicates
from memfree.data.duplicates import distinct, group, near_pairs
from memfree.data.duplication_plan import _jpeg
from memfree.images import to_image


def digits(count: int | None = None) -> np.ndarray:
    images = load_digits().images[:count]
    return np.rint(images * (255 / 16)).astype(np.uint8)[:, None]


def patches(count: int, size: int) -> np.ndarray:
    """Pieces of a photograph that do not overlap, without those that show nothing but sky."""
    photo = load_sample_image("china.jpg")
    cut = [
        photo[y : y + size, x : x + size]
        for y in range(0, photo.shape[0] - size, size)
        for x in range(0, photo.shape[1] - size, size)
    ]
    busy = [piece for piece in cut if piece.std((0, 1)).min() > 25]
    assert len(busy) >= count
    return np.stack(busy[:count]).transpose(0, 3, 1, 2)


def brute_force(pixels: np.ndarray, limit: float) -> list[tuple[int, int]]:
    """All pairs of small images, window by window."""

    def unit(window: np.ndarray) -> np.ndarray:
        vector = window.astype(np.float64)
        vector = (vector - vector.mean((1, 2), keepdims=True)).ravel()
        return vector / max(np.linalg.norm(vector), 4 * len(vector) ** 0.5)

    found = []
    h, w = pixels.shape[2] - 2, pixels.shape[3] - 2
    for i in range(len(pixels)):
        centre = unit(pixels[i, :, 1:-1, 1:-1])
        for j in range(i + 1, len(pixels)):
            distance = min(
                np.linalg.norm(centre - unit(image[:, y : y + h, x : x + w]))
                for image in (pixels[j], pixels[j, :, :, ::-1])
                for y in range(3)
                for x in range(3)
            )
            if distance <= limit:
                found.append((i, j))
    return found


def test_pairs_equal_brute_force(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 37)  # several blocks
    monkeypatch.setattr(duplicates, "_RANK", 8)  # a loose projection must lose nothing
    pixels = digits(80)
    expected = brute_force(pixels, 0.35)
    assert len(expected) > 2
    assert sorted(map(tuple, near_pairs(pixels, 0.35).tolist())) == expected


def test_digits_hardly_meet_by_chance():
    pixels = digits()
    assert len(distinct(pixels)[1]) == 1797
    assert len(near_pairs(pixels)) == 9
    assert len(near_pairs(pixels, 0)) == 0
    pairs = near_pairs(pixels, 0.3)
    later = near_pairs(pixels, 0.3, since=1000)
    assert len(later) and (later == pairs[pairs[:, 1] >= 1000]).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., ::-1],
        lambda x: np.roll(x, 1, -1),
        lambda x: np.roll(x, (-1, 1), (-2, -1)),
        lambda x: np.clip(np.rint(x * 0.8), 0, 255).astype(np.uint8),
        lambda x: np.clip(np.rint(x * 0.7 + 40), 0, 255).astype(np.uint8),
        lambda x: np.stack([_jpeg(image, 75) for image in x]),
    ],
    ids=["flip", "shift right", "shift up and right", "darker", "less contrast", "jpeg"],
)
@pytest.mark.parametrize("kind", ["digits", "photo"])
def test_changed_pictures_are_found(kind, change):
    pixels = digits(60) if kind == "digits" else patches(60, 40)
    pairs = near_pairs(np.concatenate([pixels, change(pixels)]))
    found = {(i, j) for i, j in pairs.tolist() if j == i + 60}
    assert len(found) == 60


def test_resized_photographs_are_found():
    pixels = patches(40, 48)
    smaller = np.stack(
        [np.asarray(to_image(image).resize((45, 45)).resize((48, 48))) for image in pixels]
    ).transpose(0, 3, 1, 2)
    pairs = near_pairs(np.concatenate([pixels, smaller]))
    assert {(i, i + 40) for i in range(40)} <= set(map(tuple, pairs.tolist()))
    assert len(near_pairs(pixels)) == 0


def test_colour_keeps_pictures_apart():
    shape = np.zeros((1, 3, 8, 8), np.uint8)
    red, blue = shape.copy(), shape.copy()
    red[:, 0, 2:6, 2:5] = 200
    blue[:, 2, 2:6, 2:5] = 200
    assert len(near_pairs(np.concatenate([red, blue]))) == 0


def test_tiny_and_single_images():
    noise = np.random.default_rng(0).integers(0, 255, (5, 1, 3, 3)).astype(np.uint8)
    pairs = near_pairs(np.concatenate([noise, noise[:1, :, :, ::-1]]))
    assert (0, 5) in map(tuple, pairs.tolist())
    assert near_pairs(noise[:1]).shape == (0, 2)


def test_distinct_numbers_by_first_appearance():
    images = digits(4)[[2, 0, 2, 1, 0]]
    of, first = distinct(images)
    assert of.tolist() == [0, 1, 0, 2, 1]
    assert first.tolist() == [0, 1, 3]


def test_groups_join_pairs_and_declared_names():
    names = ["a", None, None, "a", None, None]
    groups = group(6, np.array([[1, 2], [2, 4]]), names)
    assert groups.tolist() == [0, 1, 1, 0, 1, 2]
