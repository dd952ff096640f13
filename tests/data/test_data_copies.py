"""What is repeated, how, and that duplicates of the source stay together."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from memfree.data import (
    DatasetFolder,
    DuplicationPlan,
    PartSizes,
    prepare,
)

SMALL = PartSizes(train=60, calibration=40, test=30, fit=20)


def test_near_copies_are_images_of_their_own(tmp_path):
    plan = DuplicationPlan(images=3, factor=10, kinds=["crop", "flip", "brightness", "jpeg"])
    prepare(tmp_path / "out", parts=SMALL, plan=plan)
    train = DatasetFolder(tmp_path / "out").part("train")
    made = [key for key in train.keys if "~" in key]
    assert int(train.copies.sum()) == 57 + 30 and len(made) > 15
    assert train.keys[: len(train) - len(made)] == [key for key in train.keys if "~" not in key]
    groups = dict(zip(train.keys, train.groups, strict=True))
    assert all(groups[key] == groups[key.split("~")[0]] for key in made)
    sizes = Counter()
    for group, copies in zip(train.groups, train.copies.tolist(), strict=True):
        sizes[group] += copies
    assert sorted(sizes.values())[-4:] == [1, 10, 10, 10] or sorted(sizes.values())[-3:] == [10] * 3
    pixels = {image.numpy().tobytes() for image in train.images()}
    assert len(pixels) == len(train)  # distinct keys are distinct pixels


def test_ladder(tmp_path):
    plan = DuplicationPlan(ladder=[1, 2, 4, 16], images_per_factor=5, choice="balanced")
    prepare(tmp_path / "out", parts=SMALL, plan=plan)
    train = DatasetFolder(tmp_path / "out").part("train")
    assert Counter(train.copies.tolist()) == {1: 45, 2: 5, 4: 5, 16: 5}


@pytest.mark.parametrize("policy", ["same", "varied", "unique"])
def test_labels_of_copies(tmp_path, policy):
    plan = DuplicationPlan(images=2, factor=60, conditions=policy)
    prepare(tmp_path / "out", parts=SMALL, plan=plan)
    folder = DatasetFolder(tmp_path / "out")
    train = folder.part("train")
    conditions = train.conditions.to_pylist()
    assert sum(row["count"] for row in conditions) == 58 + 120
    own = dict(zip(train.keys, load_digits().target[_numbers(train.keys)], strict=True))
    repeated = [key for key, n in zip(train.keys, train.copies, strict=True) if n == 60]
    assert len(repeated) == 2
    for key in repeated:
        counts = {row["label"]: row["count"] for row in conditions if row["image_key"] == key}
        assert sum(counts.values()) == 60
        if policy == "same":
            assert counts == {own[key]: 60}
        elif policy == "varied":
            assert counts[own[key]] == 1 and set(counts) == set(range(10))
        else:
            assert counts[own[key]] == 1 and min(set(counts) - {own[key]}) >= 10
            assert set(counts.values()) == {1}
    assert folder.num_classes == (128 if policy == "unique" else 10)


def _numbers(keys):
    return [int(key.split("-")[1]) for key in keys]


@pytest.mark.parametrize("policy", ["same", "varied", "unique"])
def test_captions_of_copies(tmp_path, make_shard, policy):
    make_shard(tmp_path, 0, 40)
    plan = DuplicationPlan(images=2, factor=4, conditions=policy)
    prepare(tmp_path / "out", "shards", str(tmp_path), image_size=8, plan=plan)
    folder = DatasetFolder(tmp_path / "out")
    train = folder.part("train")
    assert folder.num_classes is None and train.labels is None
    own = {key: f"picture {key.split('/')[1]}" for key in train.keys}
    for key, copies in zip(train.keys, train.copies.tolist(), strict=True):
        found = [row for row in train.conditions.to_pylist() if row["image_key"] == key]
        captions = Counter({row["caption"]: row["count"] for row in found})
        assert sum(captions.values()) == copies
        if copies == 1 or policy == "same":
            assert captions == {own[key]: copies}
        elif policy == "varied":
            assert captions[own[key]] == 1 and set(captions) <= set(own.values())
        else:
            assert len(captions) == 4 and all(text.startswith(own[key]) for text in captions)


def test_duplicates_of_the_source_stay_together(tmp_path, encode):
    generator = np.random.default_rng(0)
    source = tmp_path / "images"
    for number in range(40):
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        for label in ("a", "b") if number < 10 else ("a",):  # ten exact duplicates
            (source / label).mkdir(parents=True, exist_ok=True)
            (source / label / f"{number}.png").write_bytes(encode(pixels))
        if 10 <= number < 20:  # ten mirrored
            (source / "b" / f"{number}.png").write_bytes(encode(pixels[:, ::-1]))
    prepare(tmp_path / "out", "folder", str(source), seed=3)
    folder = DatasetFolder(tmp_path / "out")
    manifest = folder.manifest
    assert manifest["grouping"]["exact_duplicates"] == 10
    assert manifest["grouping"]["near_pairs"] == 10
    parts = {name: folder.part(name) for name in ("train", "calibration", "test", "fit")}
    for first, second in ((a, b) for a in parts for b in parts if a < b):
        assert not set(parts[first].groups) & set(parts[second].groups)
    assert sum(manifest["parts"][name]["records"] for name in parts) == 60
    assert [manifest["parts"][name]["records"] for name in parts] == [42, 6, 6, 6]
    copies = Counter(n for part in parts.values() for n in part.copies.tolist())
    assert copies == {1: 40, 2: 10}
    two = [row for row in folder.conditions.to_pylist() if row["image_key"] == "a/3.png"]
    assert sorted((row["label"], row["count"]) for row in two) == [(0, 1), (1, 1)]


def test_only_images_without_a_duplicate_are_repeated(tmp_path, encode):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = generator.integers(0, 256, (8, 8)).astype(np.uint8)
        (tmp_path / "images" / f"{number}.png").write_bytes(encode(pixels))
        if number < 10:
            (tmp_path / "images" / f"{number}-mirrored.png").write_bytes(encode(pixels[:, ::-1]))
    arguments = {"source": "folder", "path": str(tmp_path / "images")}
    sizes = PartSizes(train=30, calibration=0, test=0, fit=0)
    plan = DuplicationPlan(images=10, factor=3)
    prepare(tmp_path / "out", **arguments, parts=sizes, plan=plan)
    train = DatasetFolder(tmp_path / "out").part("train")
    repeated = {key for key, n in zip(train.keys, train.copies.tolist(), strict=True) if n > 1}
    assert repeated == {f"{number}.png" for number in range(10, 20)}
    with pytest.raises(ValueError, match="wants to repeat 11 images, but only 10"):
        plan = DuplicationPlan(images=11, factor=3)
        prepare(tmp_path / "other", **arguments, parts=sizes, plan=plan)
