"""Images added and removed, captions of what is copied, and an index without names."""

import hashlib
import hmac
import json
import re
import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from memfree.guidance import NormalizedL2, calibrate
from memfree.guidance.calibration import calibration_of
from memfree.retrieval import Features, ReferenceIndex
from memfree.retrieval.hashing import hashed_key, read_salt

SALT = "sixteen characters and more"


class Averages(Features):
    """A tiny extractor that images cannot be had back from."""

    metric = "cosine"

    def forward(self, images):
        rows, columns = images.float().mean(dim=3), images.float().mean(dim=2)
        vectors = torch.cat([rows, columns], dim=2).flatten(1)
        return torch.nn.functional.normalize(vectors, dim=1)

    def describe(self):
        return {"name": "averages", "metric": "cosine"}


def images_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1


def near(images, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def same(first, second):
    """All that an index says of its rows, but for default keys."""
    assert torch.allclose(first.vectors, second.vectors, atol=1e-6)
    assert torch.equal(first.group, second.group)
    assert torch.equal(first.multiplicity, second.multiplicity)
    assert torch.equal(first.group_multiplicity, second.group_multiplicity)
    assert first.items.contents == second.items.contents
    columns = ("row", "image_key", "label", "caption", "count")
    tables = [
        sorted(zip(*(index.items.conditions[c].to_pylist() for c in columns), strict=True))
        for index in (first, second)
    ]
    assert tables[0] == tables[1]
    queries = images_of(5, seed=9)
    assert torch.equal(first.search(queries, 3).rows, second.search(queries, 3).rows)


def a_batch():
    """14 images: some identical, some near copies, captioned, labelled and counted."""
    distinct = images_of(10)
    images = torch.cat([distinct, distinct[[2, 7]], near(distinct[[3, 8]])])
    return {
        "images": images,
        "captions": [f"caption {i % 5}" for i in range(14)],
        "labels": torch.arange(14) % 3,
        "counts": torch.arange(1, 15),
        "keys": [f"key {i}" for i in range(14)],
    }


def part(batch, start, stop):
    return {name: value[start:stop] for name, value in batch.items()}


# --- adding


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
    image = images_of(1)
    steps = torch.cat([image * (1 - 0.04 * i) for i in range(3)])
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


# --- captions


def test_the_duplicated_caption_is_the_most_common_of_more_than_m():
    images = images_of(6)
    index = ReferenceIndex.build(
        torch.cat([images, images[1:3]]),
        captions=["near", "a", "b", "b", "c", "c", "a", "x"],
        counts=torch.tensor([1, 3, 1, 2, 1, 3, 1, 5]),
        groups=[0, 1, 2, 3, 4, 5, 1, 2],
    )
    # Records: a 3 + 1, b 1 + 2, c 1 + 3, x 5.
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 4], [0, 4, 5, 1], [0, 1, 4, 5]])

    def found(m, policy="most_common"):
        return index.duplicated_caption(rows, policy, m)

    assert found(0) == ["x", "a", "c", "a"]  # of equals, the nearer image's
    assert found(3) == ["x", "a", "c", "a"]
    assert found(4) == ["x", "near", "near", "near"]
    assert found(5) == ["near"] * 4
    assert found(0, "nearest") == ["near"] * 4
    assert index.duplicated_caption(rows[:, 1:]) == ["a", "a", "c", "a"]


def test_near_copies_of_a_neighbour_count_too():
    index = ReferenceIndex.build(
        images_of(4),
        captions=["a", "b", "c", "c"],
        counts=torch.tensor([2, 1, 1, 4]),
        groups=["x", "y", "y", "y"],
    )
    assert index.duplicated_caption(torch.tensor([[0, 1]]), "most_common", m=4) == ["c"]
    assert index.duplicated_caption(torch.tensor([[0]]), "most_common", m=1) == ["a"]


def test_captions_are_brute_force():
    generator = np.random.default_rng(0)
    count = 60
    captions = [f"c{i}" for i in generator.integers(0, 8, count)]
    copies = torch.from_numpy(generator.integers(1, 6, count))
    images = images_of(40)[generator.integers(0, 40, count)]
    index = ReferenceIndex.build(images, captions=captions, counts=copies, groups=range(count))
    rows = index.search(images_of(20, 3), 12).rows
    contents = {}
    for i in range(count):
        contents.setdefault(images[i].numpy().tobytes(), []).append(i)
    members = list(contents.values())
    for m in (0, 9, 12, 15, 20):
        for found, neighbours in zip(
            index.duplicated_caption(rows, "most_common", m), rows.tolist(), strict=True
        ):
            totals = {}
            for group in dict.fromkeys(index.group[neighbours].tolist()):
                for row in torch.nonzero(index.group == group).flatten().tolist():
                    for i in members[row]:
                        totals[captions[i]] = totals.get(captions[i], 0) + int(copies[i])
            most = max(totals.values())
            if most > m:
                assert totals[found] == most
            else:
                assert found == index.captions[neighbours[0]]


def test_captions_that_are_not_there():
    index = ReferenceIndex.build(images_of(3))
    rows = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="no captions"):
        index.duplicated_caption(rows)
    captioned = index.add(images_of(1, 3), captions=["late"], groups=[index.keys[0]])
    # An image without a caption gives that of its near copies, or none.
    assert captioned.duplicated_caption(torch.tensor([[0, 1], [1, 0]])) == ["late", ""]
    with pytest.raises(ValueError, match=r"\(B, k\)"):
        captioned.duplicated_caption(torch.tensor([0]))
    with pytest.raises(ValueError, match="m is -1"):
        captioned.duplicated_caption(rows, m=-1)


# --- without names


def test_a_hashed_index_names_nothing(tmp_path):
    batch = a_batch()
    index = ReferenceIndex.build(**batch, features=Averages(), num_classes=3)
    index.items.shards = ["train-000.tar"] * len(index)
    index.calibrations["cosine"] = {"kept": True}
    hidden = index.hashed(SALT)
    assert torch.equal(hidden.vectors, index.vectors)
    assert torch.equal(hidden.group, index.group)
    assert torch.equal(hidden.label_counts, index.label_counts)
    assert hidden.calibrations == index.calibrations
    assert hidden.captions is None
    hidden.save(tmp_path / "hidden")
    for path in (tmp_path / "hidden").iterdir():
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = json.dumps(pq.read_table(path).to_pylist()).encode()
        secrets = [b"key 1", b"caption", b"train-000", SALT.encode()]
        secrets.append((index.items.contents[0] or "").encode())
        assert not any(secret in content.replace(b'"caption"', b"") for secret in secrets), path
    queries = images_of(4, 5)
    assert torch.equal(hidden.search(queries, 2).rows, index.search(queries, 2).rows)
    # The owner finds out what was hit.
    expected = hmac.new(SALT.encode(), b"key 4", hashlib.sha256).hexdigest()
    assert hidden.keys[4] == hashed_key("key 4", SALT) == expected
    assert index.hashed(SALT + "!").keys[4] != expected
    asked = index.hashed(SALT, keep_captions=True, keep_shards=True)
    assert asked.captions == index.captions
    assert asked.items.shards == index.items.shards
    with pytest.raises(ValueError, match="keys are hashed"):
        hidden.add(images_of(1, 3), labels=torch.tensor([0]))
    assert hidden.remove([expected]).keys == hidden.keys[:4] + hidden.keys[5:]


def test_hashing_does_not_hide_what_shows(tmp_path):
    with pytest.raises(ValueError, match="pixels features shows its images"):
        ReferenceIndex.build(images_of(3)).hashed(SALT)
    with pytest.raises(ValueError, match="5 characters"):
        ReferenceIndex.build(images_of(3), Averages()).hashed("short")
    salt = read_salt(tmp_path / "new" / "salt")
    assert len(salt) == 64 and read_salt(tmp_path / "new" / "salt") == salt
    assert stat.S_IMODE((tmp_path / "new" / "salt").stat().st_mode) == 0o600


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
