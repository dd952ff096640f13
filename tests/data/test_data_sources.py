"""Digits, CIFAR-10, image folders and shards as sources."""

import json

import numpy as np
import pytest
from pictures import picture

from memfree.data.ingest import Framing, ingest, open_source
from memfree.data.shard_reader import read_shard
from memfree.data.skipped import Skipped
from memfree.data.sources import Digits, ImageFolder, Shards


def load(source, tmp_path, framing=None, skipped=None):
    return ingest(source, framing or Framing(None, None, None), tmp_path / "px.tmp", skipped)


def test_nothing_is_converted_silently(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    (tmp_path / "b.png").write_bytes(encode(picture(1, channels=1)))
    with pytest.raises(ValueError, match="b.png: 1 channel, but the first image has 3"):
        load(ImageFolder(tmp_path), tmp_path)
    (tmp_path / "b.png").write_bytes(encode(picture(1, 11)))
    (tmp_path / "px.tmp").unlink()
    with pytest.raises(ValueError, match=r"b.png: 10 x 11 pixels.* --image_size"):
        load(ImageFolder(tmp_path), tmp_path)


def test_digits(tmp_path):
    data = load(Digits(), tmp_path)
    assert data.pixels.shape == (1797, 1, 8, 8)
    assert data.pixels.min() == 0 and data.pixels.max() == 255
    assert data.num_classes(None) == 10 and data.captions is None


def test_class_folders(tmp_path, encode):
    for number, name in enumerate(("dog/a.png", "cat/deep/b.jpg", "dog/c.WEBP")):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(
            encode(
                picture(number),
                {"g": "PNG", "p": "WEBP"}.get(name[-1].lower())
                if not name.endswith("jpg")
                else "JPEG",
            )
        )
    (tmp_path / "dog" / "notes.md").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    data = load(source, tmp_path)
    assert data.names == ["cat/deep/b.jpg", "dog/a.png", "dog/c.WEBP"]
    assert data.labels == [0, 1, 1]


def test_captions_beside_images(tmp_path, encode):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encode(picture(0)))
        (tmp_path / f"{name}.txt").write_text(f" the letter {name}\n")
    data = load(ImageFolder(tmp_path), tmp_path)
    assert data.captions == ["the letter a", "the letter b"] and data.labels is None
    (tmp_path / "b.txt").unlink()
    (tmp_path / "px.tmp").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.png: other images have a caption, b.txt"):
        load(ImageFolder(tmp_path), tmp_path)


def test_folder_errors(tmp_path, encode):
    with pytest.raises(FileNotFoundError, match="--path: no image folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="--path: no PNG, JPEG or WEBP"):
        ImageFolder(tmp_path)
    (tmp_path / "class").mkdir()
    for name in ("a.png", "class/b.png"):
        (tmp_path / name).write_bytes(encode(picture(0)))
    with pytest.raises(ValueError, match="1 image outside of the class folders"):
        ImageFolder(tmp_path)


def test_unreadable_image_stops_or_is_counted(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(encode(picture(0)))
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"b.png: not a PNG"):
        load(ImageFolder(tmp_path), tmp_path)
    (tmp_path / "px.tmp").unlink()
    skipped = Skipped()
    data = load(ImageFolder(tmp_path), tmp_path, skipped=skipped)
    assert len(data.names) == 1 and "b.png" in skipped.messages[0]
    assert (skipped.records, skipped.kept, skipped.shards) == (1, 1, set())


def test_open_source_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="--source folder needs --path"):
        open_source("folder", None)
    with pytest.raises(ValueError, match="--path has no meaning"):
        open_source("digits", "somewhere")
    with pytest.raises(FileNotFoundError, match="no tar shards"):
        open_source("shards", str(tmp_path))


def test_cifar10_reads_both_parts(tmp_path, monkeypatch):
    class Fake:
        classes = ["plane", "car"]

        def __init__(self, root, train, download):
            count = 3 if train else 2
            self.data = np.stack([picture(seed, 32, 32) for seed in range(count)])
            self.targets = [seed % 2 for seed in range(count)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = load(open_source("cifar10", str(tmp_path / "download")), tmp_path)
    assert data.names[0] == "cifar10-train-00000" and data.names[-1] == "cifar10-test-00001"
    assert (data.pixels[1] == picture(1, 32, 32).transpose(2, 0, 1)).all()

    def offline(*arguments, **options):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(OSError, match="CIFAR-10 could not be downloaded to .*: no network"):
        open_source("cifar10", str(tmp_path / "download"))


def test_img2dataset_shards(tmp_path, make_shard):
    for number in (1, 0):
        make_shard(tmp_path, number, 3)
    data = load(Shards(str(tmp_path)), tmp_path, Framing(8, 8, 3))
    assert data.names[0] == "00000/000000000" and len(data.names) == 6
    assert data.captions[4] == "picture 000010001"
    assert data.pixels.shape == (6, 3, 8, 8)


def test_classes_and_declared_groups_of_shards(tmp_path, tar, encode):
    meta = json.dumps({"image_key": "k", "group": "g", "label": 7}).encode()
    tar(
        tmp_path / "a.tar",
        [("x/0.png", encode(picture(0))), ("x/0.json", meta), ("x/0.seg.png", b"other")],
    )
    record = next(read_shard(str(tmp_path / "a.tar")))
    assert (record.label, record.group, record.image_key) == (7, "g", "k")
    tar(tmp_path / "b.tar", [("1.png", encode(picture(0))), ("1.cls", b"3\n")])
    assert next(read_shard(str(tmp_path / "b.tar"))).label == 3


def test_names_in_archives_are_not_paths(tmp_path, tar, encode):
    shard = tar(tmp_path / "evil.tar", [("../../../etc/evil.png", encode(picture(0)))])
    with pytest.raises(ValueError, match="its name climbs with .."):
        load(Shards(str(shard)), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"evil.tar", "px.tmp"}


def test_mixture_of_conditions_is_refused(tmp_path, tar, encode):
    tar(
        tmp_path / "a.tar",
        [("1.png", encode(picture(0))), ("1.cls", b"3"), ("2.png", encode(picture(1)))],
    )
    with pytest.raises(ValueError, match="a/2 has no label, but a/1 has one"):
        load(Shards(str(tmp_path / "a.tar")), tmp_path)


def test_repeated_keys_become_unique(tmp_path, make_shard):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        make_shard(tmp_path / folder, 0, 2)
    data = load(Shards(str(tmp_path / "{x,y}")), tmp_path, Framing(8, 8, 3))
    assert len(set(data.names)) == 4
