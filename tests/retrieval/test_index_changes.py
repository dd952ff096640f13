"""Images added and removed."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from changed_indexes import Averages, a_batch, images_of, near, part, same

from memfree.guidance import NormalizedL2, calibrate
from memfree.guidance.calibration import calibration_of
from memfree.retrieval import ReferenceIndex


@pytest.mark.parametrize("cut", [1, 5, 11, 13])
def test_adding_is_building_from_scratch(cut):
    batch = a_batch()
    built = ReferenceIndex.build(**batch, num_classes=3)
    index = ReferenceIndex.build(**part(batch, 0, cut), num_classes=3)
    before = len(index), index.multiplicity.clone()
    added = index.add(**part(batch, cut, 14))
    same(added, built)
    assert added.keys == built.keys
    assert torch.equal(added.label_counts, built.label_counts)
    assert added.captions == built.captions
    assert (len(index), index.multiplicity.tolist()) == (before[0], before[1].tolist())


def test_a_near_copy_joins_two_groups_that_it_links():
    image, change = 0.8 * images_of(1), images_of(1, seed=2)
    steps = torch.cat([image + 0.1 * i * change for i in range(3)])
    built = ReferenceIndex.build(steps)
    ends = ReferenceIndex.build(steps[[0, 2]])
    assert ends.group.tolist() == [0, 1]
    added = ends.add(steps[1:2])
    assert added.group.tolist() == built.group.tolist() == [0, 0, 0]


def test_old_rows_that_were_declared_apart_stay_apart():
    images = images_of(2)
    index = ReferenceIndex.build(torch.cat([images, near(images)]), groups=range(4))
    assert index.add(images_of(1, seed=4)).group.tolist() == [0, 1, 2, 3, 4]
    # And so do new ones that are declared to be alone.
    added = ReferenceIndex.build(images).add(near(images), groups=["x", "y"])
    assert added.group.tolist() == [0, 1, 2, 3]


def test_declared_groups_name_each_other_and_indexed_keys():
    images = images_of(7)
    keys = list("abcdefg")
    groups = ["a", "b", "a", "b", "new", "c", "new"]
    built = ReferenceIndex.build(images, keys=keys, groups=groups)
    index = ReferenceIndex.build(images[:3], keys=keys[:3], groups=groups[:3])
    added = index.add(images[3:], keys=keys[3:], groups=["b", "new", "other", "new"])
    same(added, built)


def test_embeddings_are_added_to_as_well(tmp_path):
    batch = a_batch()
    declared = {"groups": [key for key in batch["keys"]]}
    declared["groups"][12:] = ["key 3", "key 8"]
    built = ReferenceIndex.build(**batch, **declared, features=Averages(), num_classes=3)
    first = {**part(batch, 0, 5), "groups": declared["groups"][:5]}
    index = ReferenceIndex.build(**first, features=Averages(), num_classes=3)
    same(index.add(**part(batch, 5, 14), groups=declared["groups"][5:]), built)
    # Without groups, near copies are found among the new images only.
    added = index.add(near(images_of(10)[[0]]), labels=torch.tensor([0]))
    assert added.group.tolist() == [0, 1, 2, 3, 4, 5]
    twice = torch.cat([images_of(1, seed=7), near(images_of(1, seed=7))])
    added = index.add(twice, labels=torch.tensor([0, 1]))
    assert added.group.tolist() == [0, 1, 2, 3, 4, 5, 5]


def test_an_added_index_can_be_saved_and_added_to_again(tmp_path):
    batch = a_batch()
    built = ReferenceIndex.build(**batch, num_classes=3)
    index = ReferenceIndex.build(**part(batch, 0, 4), num_classes=3)
    for start, stop in ((4, 9), (9, 14)):
        index = index.add(**part(batch, start, stop))
        index.save(tmp_path / "index", overwrite=True)
        index = ReferenceIndex.load(tmp_path / "index")
    same(index, built)


def test_default_keys_are_free():
    index = ReferenceIndex.build(images_of(3), keys=["a", "image-00000003", "c"])
    added = index.add(images_of(2, seed=5))
    assert added.keys == ["a", "image-00000003", "c", "image-00000004", "image-00000005"]


def test_what_cannot_be_added_is_refused():
    images = images_of(4)
    index = ReferenceIndex.build(images, keys=list("abcd"))
    for arguments, message in [
        ({"images": images_of(1, 3), "keys": ["b"]}, "key 'b' already stands for another"),
        ({"images": images_of(2, 3), "keys": ["x", "x"]}, "key 'x' already stands"),
        ({"images": torch.zeros(1, 3, 6, 5)}, r"\(3, 6, 5\), but the index is of images \(3, 6, 6"),
        ({"images": images, "labels": torch.arange(4)}, "has no labels"),
        ({"images": images, "captions": ["a"]}, "captions has 1 entries"),
        ({"images": images * 3}, "span"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.add(**arguments)
    labelled = ReferenceIndex.build(images, labels=torch.arange(4))
    with pytest.raises(ValueError, match="give the labels"):
        labelled.add(images_of(1, 3))
    with pytest.raises(ValueError, match="below 4"):
        labelled.add(images_of(1, 3), labels=torch.tensor([4]))
    # The same key for the same image only adds to it.
    assert index.add(images[:1], keys=["a"]).multiplicity.tolist() == [2, 1, 1, 1]


def test_an_index_of_the_first_version_is_read(tmp_path):
    index = ReferenceIndex.build(images_of(4))
    index.save(tmp_path / "index")
    items = tmp_path / "index" / "items.parquet"
    pq.write_table(pq.read_table(items).drop_columns(["content"]), items)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    manifest["files"]["items.parquet"] = hashlib.sha256(items.read_bytes()).hexdigest()
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    again = ReferenceIndex.load(tmp_path / "index")
    # Pixels say themselves what they are; embeddings do not.
    same(again.add(images_of(6)), index.add(images_of(6)))
    again.features = Averages()
    with pytest.raises(ValueError, match="does not know which images it holds"):
        again.add(images_of(1, 3))


# --- removing


@pytest.mark.parametrize("gone", [[0], [3, 4], [9, 2, 7], list(range(1, 10))])
def test_removing_is_building_without(gone):
    batch = a_batch()
    index = ReferenceIndex.build(**batch, num_classes=3)
    # Copies go with the row that they are.
    copies = {2: 10, 7: 11}
    away = {*gone, *(copies[i] for i in gone if i in copies)}
    kept = [i for i in range(14) if i not in away]
    built = ReferenceIndex.build(
        **{
            name: value[kept] if isinstance(value, torch.Tensor) else [value[i] for i in kept]
            for name, value in batch.items()
        },
        num_classes=3,
    )
    found = index.remove([f"key {i}" for i in gone])
    same(found, built)
    assert found.keys == built.keys
    assert int(found.group.max()) + 1 == len(found.group.unique())
    assert torch.equal(found.label_counts, built.label_counts)
    assert len(index) == 12


def test_what_cannot_be_removed_is_refused():
    index = ReferenceIndex.build(images_of(3), keys=list("abc"))
    with pytest.raises(ValueError, match="no image 'x' and 1 more; nothing was removed"):
        index.remove(["a", "x", "y"])
    with pytest.raises(ValueError, match="cannot be empty"):
        index.remove(list("abc"))
    assert index.remove("b").keys == ["a", "c"]
    assert index.keys == ["a", "b", "c"]


def test_adding_and_removing_again_changes_nothing():
    index = ReferenceIndex.build(images_of(6), captions=list("uvwxyz"), keys=list("abcdef"))
    added = index.add(images_of(3, 8), captions=list("rst"), keys=list("ghi"))
    same(added.remove("ghi"[:1]).remove(["h", "i"]), index)


def test_thresholds_must_be_measured_again(tmp_path):
    similarity = NormalizedL2(k=3)
    index = ReferenceIndex.build(images_of(30))
    calibrate(index, similarity, images_of(100, 2), false_positive_rate=0.1)
    for changed, why in [
        (index.add(images_of(1, 3)), "images were added"),
        (index.remove(index.keys[:1]), "images were removed"),
    ]:
        changed.save(tmp_path / "index", overwrite=True)
        again = ReferenceIndex.load(tmp_path / "index")
        for each in (changed, again):
            with pytest.raises(ValueError, match=f"out of date, {why} since"):
                calibration_of(each, similarity)
            assert each.dataset_hash is None
        calibrate(again, similarity, images_of(100, 2), false_positive_rate=0.1)
        calibration_of(again, similarity)
    calibration_of(index, similarity)


def test_the_example_of_the_method_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    keys = [f"digits-{i:04d}" for i in range(60)]
    images, labels = images_of(60), torch.arange(60) % 10
    ReferenceIndex.build(images, keys=keys, labels=labels).save("runs/index")
    names = {
        "images": images_of(2, 3),
        "labels": torch.tensor([4, 2]),
        "held_out_images": images_of(600, 4),
    }
    exec(compile(block, "docs/method.md", "exec"), names)
    index = ReferenceIndex.load("runs/changed-index")
    assert index.keys == [*keys[:17], *keys[18:], "mine-0", "mine-1"]
    assert calibration_of(index, NormalizedL2()).threshold(0.01) < 0
