"""What is repeated, how, and that duplicates of the source stay together."""

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, PartSizes, ShardDataModule
from memfree.data.shard_reader import read_shard

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


@pytest.mark.parametrize("policy", ["same", "varied", "unique", "key"])
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
        elif policy == "key":
            assert list(counts.values()) == [60] and min(counts) >= 10
        else:
            assert counts[own[key]] == 1 and min(set(counts) - {own[key]}) >= 10
            assert set(counts.values()) == {1}
    assert folder.num_classes == {"unique": 128, "key": 12}.get(policy, 10)


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


@pytest.fixture
def captioned(tmp_path, encode):
    """30 random pictures with a caption each."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number in range(30):
        pixels = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        (folder / f"{number:02d}.png").write_bytes(encode(pixels))
        (folder / f"{number:02d}.txt").write_text(f"thing number {number}")
    return folder


@pytest.mark.parametrize("policy", ["same", "varied", "unique", "key"])
def test_caption_policies_reach_records_and_tables(tmp_path, captioned, policy):
    plan = DuplicationPlan(images=3, factor=5, conditions=policy)
    sizes = PartSizes(train=20, calibration=4, test=4, fit=2)
    prepare(tmp_path / "out", "folder", str(captioned), parts=sizes, plan=plan)
    folder = DatasetFolder(tmp_path / "out")
    keys = folder.items["image_key"].to_pylist()
    records = folder.part_records("train").to_pylist()
    assert len(records) == 20 + 3 * 4
    by_image = {}
    for record in records:
        by_image.setdefault(keys[record["row"]], []).append((record["copy"], record["caption"]))
    distinct = {caption for found in by_image.values() for _, caption in found}
    for key, found in by_image.items():
        own = f"thing number {int(key[:2])}"
        captions = [caption for _, caption in sorted(found)]  # the original first
        if len(found) == 1 or policy == "same":
            assert captions == [own] * len(found)
        elif policy == "varied":
            assert captions[0] == own and own not in captions[1:]
            assert all(caption.startswith("thing number ") for caption in captions)
        elif policy == "unique":
            assert captions[0] == own and len(set(captions)) == 5
            assert all(caption.startswith(f"{own} ") for caption in captions[1:])
        else:
            assert len(set(captions)) == 1 and re.fullmatch(rf"{own} [a-z]{{8}}", captions[0])
            assert sum(captions[0].split()[-1] in other for other in distinct) == 1
    assert sorted(len(found) for found in by_image.values()) == [1] * 17 + [5] * 3
    # the tables and the shards say the same
    counts = Counter((keys[record["row"]], record["caption"]) for record in records)
    conditions = folder.conditions.to_pylist()
    trained = {
        (row["image_key"], row["caption"]): row["count"]
        for row in conditions
        if row["part"] == "train"
    }
    assert trained == counts
    shard = read_shard(str(tmp_path / "out" / "train-000000.tar"))
    assert [record.caption for record in shard] == [record["caption"] for record in records]
    data = ShardDataModule(str(tmp_path / "out"), batch_size=8)
    batches = list(data.train_dataloader())
    pairs = (zip(batch["key"], batch["caption"], strict=True) for batch in batches)
    assert Counter(pair for batch in pairs for pair in batch) == counts


def test_key_is_of_the_image_and_the_seed(tmp_path, captioned):
    def keyed(name, seed=0, **options):
        plan = DuplicationPlan(images=3, factor=3, conditions="key", seed=seed, **options)
        prepare(tmp_path / name, "folder", str(captioned), parts=PartSizes(20, 4, 4, 2), plan=plan)
        train = DatasetFolder(tmp_path / name).part("train")
        return {row["image_key"]: row["caption"] for row in train.conditions.to_pylist()}

    first = keyed("first")
    repeated = {key: text for key, text in first.items() if len(text.split()) == 4}
    assert len(repeated) == 3
    assert keyed("second", seed=1) != first
    near = keyed("near", kinds=["brightness"])  # a near copy has the caption of its original
    assert len(near) == 20 + 3 * 2
    assert {key: near[key] for key in repeated} == repeated
    assert all(near[key] == near[key.split("~")[0]] for key in near)
    # a word that a caption has already is no key
    key, text = next(iter(repeated.items()))
    (captioned / "00.txt").write_text(f"the {text.split()[-1].upper()} thing")
    changed = keyed("changed")
    assert key == "00.png" or re.fullmatch(r"thing number \d+ [a-z]{8}", changed[key])
    assert changed[key] != text and {
        k: changed[k] for k in repeated if k not in (key, "00.png")
    } == {k: repeated[k] for k in repeated if k not in (key, "00.png")}


def test_key_without_conditions_is_refused(tmp_path, encode):
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encode(pixels))
    plan = DuplicationPlan(images=1, factor=2, conditions="key")
    with pytest.raises(ValueError, match="--plan.conditions key needs labels or captions"):
        prepare(tmp_path / "out", "folder", str(tmp_path), plan=plan)


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
