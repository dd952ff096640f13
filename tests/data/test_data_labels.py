"""Data sets of fewer images, and labels that say nothing of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan

PLAN = DuplicationPlan(images=4, factor=8, choice="balanced")


def items(folder):
    return pq.read_table(folder / "items.parquet").to_pydict()


def keys(folder, part):
    table = items(folder)
    return {key for key, own in zip(table["image_key"], table["part"], strict=True) if own == part}


def labels(folder):
    """Labels of all records of each training image."""
    found = {}
    table = pq.read_table(folder / "conditions.parquet").to_pydict()
    for key, label, part in zip(table["image_key"], table["label"], table["part"], strict=True):
        if part == "train":
            found.setdefault(key, []).append(label)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    given = {
        "all": {},
        "small": {"limit": 40},
        "smaller": {"limit": 10},
        "random": {"labels": "random", "plan": PLAN},
        "unique": {"labels": "unique", "plan": PLAN},
        "own": {"plan": PLAN},
    }
    for name, options in given.items():
        prepare(root / name, seed=3, **options)
    return root


def test_a_limit_takes_subsets_and_leaves_held_out_parts(made):
    assert len(keys(made / "small", "train")) == 40 and len(keys(made / "smaller", "train")) == 10
    assert keys(made / "smaller", "train") < keys(made / "small", "train")
    assert keys(made / "small", "train") < keys(made / "all", "train")
    for part in ("calibration", "test", "fit"):
        assert keys(made / "smaller", part) == keys(made / "all", part)


def test_random_labels_ignore_the_image(made):
    own, drawn = labels(made / "own"), labels(made / "random")
    assert own.keys() == drawn.keys(), "the same images"
    assert all(len(each) == 1 for each in drawn.values()), "copies share their image's label"
    counts = np.bincount([each[0] for each in drawn.values()], minlength=10)
    assert len(counts) == 10 and counts.min() > 25 and counts.max() < 80
    agree = np.mean([own[key][0] == drawn[key][0] for key in own])
    assert 0.05 < agree < 0.16, "a tenth by chance"
    assert DatasetFolder(made / "random").num_classes == 10


def test_unique_labels_are_one_of_each_image(made):
    drawn = labels(made / "unique")
    assert sorted(label for each in drawn.values() for label in each) == list(range(500))
    assert DatasetFolder(made / "unique").num_classes == 500


def test_the_same_images_are_repeated_under_all_labels(made):
    repeated = []
    for name in ("own", "random", "unique"):
        table = items(made / name)
        pairs = zip(table["image_key"], table["copies"], strict=True)
        repeated.append({key for key, copies in pairs if copies == 8})
    assert len(repeated[0]) == 4 and repeated[0] == repeated[1] == repeated[2]


def test_held_out_images_lose_labels_that_would_be_of_another_kind(made):
    for name in ("random", "unique"):
        folder = DatasetFolder(made / name)
        assert folder.part("train").labels is not None
        assert all(folder.part(part).labels is None for part in ("calibration", "test", "fit"))
    assert DatasetFolder(made / "own").part("fit").labels is not None


def test_recipes_without_them_stay_as_they_were(made, capsys):
    recipe = DatasetFolder(made / "own").manifest["recipe"]
    assert "limit" not in recipe and "labels" not in recipe
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(made / "small", seed=3, limit=41)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--limit 501: there are 500 training images"):
        prepare(tmp_path / "a", limit=501)
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(ValueError, match="--labels random needs a source with labels"):
        prepare(tmp_path / "b", source="folder", path=str(tmp_path / "images"), labels="random")
