"""Shards of others, streamed without an index."""

from collections import Counter

import numpy as np
import pytest
import torch
from epochs import epoch_of, keys

from memfree.data import ShardDataModule, StreamOptions
from memfree.data.batches import ForeignBatches, RankOptions
from memfree.data.skipped import Skipped

OPTIONS = StreamOptions(epoch_records=40, image_size=8, captions=True, shuffle_buffer=16)


@pytest.fixture
def shards(tmp_path, make_shard):
    for number in range(4):
        make_shard(tmp_path, number, 10)
    return str(tmp_path)


def test_one_reader_sees_every_record_once(shards):
    dataset = ForeignBatches(shards, OPTIONS, RankOptions(16))
    batches = epoch_of(dataset)
    assert [len(batch["key"]) for batch in batches] == [13, 13, 14]
    assert len(set(keys(batches))) == 40
    for batch in batches:
        assert batch["image"].shape[1:] == (3, 8, 8) and batch["image"].abs().max() <= 1
        assert batch["caption"] == [f"picture {key.split('/')[1]}" for key in batch["key"]]
        assert (batch["row"] == -1).all() and batch["weight"] == 1
    assert keys(epoch_of(dataset)) == keys(batches) != keys(epoch_of(dataset, 1))


def test_shuffled_across_and_within_shards(shards):
    found = keys(epoch_of(ForeignBatches(shards, OPTIONS, RankOptions(16))))
    order = [key.split("/")[0] for key in found]
    assert order != sorted(order)
    assert [key for key in found if key.startswith("00001")] != sorted(
        key for key in found if key.startswith("00001")
    )


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (2, 2), (3, 0), (3, 3), (5, 1)])
def test_ranks_get_equal_batches(shards, world_size, workers):
    ranks = []
    for rank in range(world_size):
        dataset = ForeignBatches(shards, OPTIONS, RankOptions(4, rank=rank, world_size=world_size))
        ranks.append(epoch_of(dataset, workers=workers))
    assert len({len(batches) for batches in ranks}) == 1
    assert sum(len(keys(batches)) for batches in ranks) == 40
    for step in zip(*ranks, strict=True):
        total = sum(len(batch["key"]) for batch in step)
        assert [batch["weight"] for batch in step] == [
            len(batch["key"]) * world_size / total for batch in step
        ]
    seen = Counter(key for batches in ranks for key in keys(batches))
    assert len(seen) >= 30  # nearly all: shares of workers are not exactly even


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_continues(shards, workers):
    dataset = ForeignBatches(shards, OPTIONS, RankOptions(8, random_flip=True))
    batches = epoch_of(dataset, workers=workers)
    rest = epoch_of(dataset, start=3, workers=workers)
    assert keys(rest) == keys(batches[3:]) and len(rest) == 2
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, batches[3:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_continues_behind_broken_records(tmp_path, tar, encode, workers):
    """Records that replaced broken ones in a batch trained on are not given once more."""
    generator = np.random.default_rng(0)
    for shard in range(4):
        members = []
        for number in range(10):
            pixels = generator.integers(0, 255, (8, 8, 3)).astype(np.uint8)
            members.append((f"{number}.png", encode(pixels) if number % 5 else b"broken"))
        tar(tmp_path / f"{shard}.tar", members)
    options = StreamOptions(epoch_records=32, image_size=8, shuffle_buffer=4)
    dataset = ForeignBatches(
        str(tmp_path), options, RankOptions(5, on_error="skip", random_flip=True)
    )
    batches = epoch_of(dataset, workers=workers)
    for start in range(1, 7):
        rest = epoch_of(dataset, start=start, workers=workers)
        assert keys(rest) == keys(batches[start:])
        for one, two in zip(rest, batches[start:], strict=True):
            assert torch.equal(one["image"], two["image"])
            assert one["skipped"].counts() == two["skipped"].counts()


def test_epoch_longer_than_the_shards(shards):
    options = StreamOptions(epoch_records=100, image_size=8)
    found = Counter(keys(epoch_of(ForeignBatches(shards, options, RankOptions(16)))))
    assert sum(found.values()) == 100 and set(found.values()) == {2, 3}


def test_more_readers_than_records(tmp_path, make_shard):
    make_shard(tmp_path, 0, 3)
    options = StreamOptions(epoch_records=5, image_size=8)
    for rank in range(5):
        dataset = ForeignBatches(str(tmp_path), options, RankOptions(1, rank=rank, world_size=5))
        assert len(keys(epoch_of(dataset))) == 1


def test_images_are_framed(tmp_path, tar, encode):
    pixels = np.full((6, 12, 3), 255, np.uint8)
    tar(tmp_path / "a.tar", [(f"{i}.png", encode(pixels)) for i in range(4)])
    options = StreamOptions(epoch_records=4, image_size=(4, 6), channels=1, resize="pad")
    batch = epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(4)))[0]
    assert batch["image"].shape == (4, 1, 4, 6)
    assert "caption" not in batch and "label" not in batch


def test_labels(tmp_path, tar, encode):
    pixels = np.zeros((4, 4, 3), np.uint8)
    members = []
    for i in range(6):
        members += [(f"{i}.png", encode(pixels)), (f"{i}.cls", str(i).encode())]
    tar(tmp_path / "a.tar", members)
    options = StreamOptions(epoch_records=6, image_size=4, num_classes=6)
    batch = epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(6)))[0]
    assert batch["label"].tolist() == [int(key.split("/")[1]) for key in batch["key"]]
    options = StreamOptions(epoch_records=6, image_size=4, num_classes=5)
    with pytest.raises(ValueError, match=r"a/5: class 5 is not in 0..4"):
        epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(6)))


def test_broken_records_and_shards(shards, tmp_path, tar, encode):
    good = encode(np.zeros((9, 9, 3), np.uint8))
    tar(tmp_path / "zz.tar", [("1.png", good), ("2.png", b"broken"), ("3.txt", b"no image")])
    (tmp_path / "zzz.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:3000])
    options = StreamOptions(epoch_records=60, image_size=8)
    with pytest.raises((ValueError, OSError), match=r"zz/2|zz/3|zzz.tar"):
        epoch_of(ForeignBatches(shards, options, RankOptions(16)))
    batches = epoch_of(ForeignBatches(shards, options, RankOptions(16, on_error="skip")))
    assert sum(len(batch["key"]) for batch in batches) == 60
    skipped = Skipped()
    for batch in batches:
        skipped.add(batch["skipped"])
    assert skipped.kept == 60
    assert skipped.records >= 2 and skipped.shards == {str(tmp_path / "zzz.tar")}


def test_nothing_readable_is_an_error(tmp_path, tar):
    tar(tmp_path / "a.tar", [("1.txt", b"no image")])
    options = StreamOptions(epoch_records=4, image_size=8)
    with (
        pytest.raises(ValueError, match="no readable record in 1 shard; first a/1: record without"),
    ):
        epoch_of(ForeignBatches(str(tmp_path), options, RankOptions(4, on_error="skip")))


def test_what_must_be_said(shards, tmp_path):
    with pytest.raises(ValueError, match=r"--data.stream.epoch_records"):
        ShardDataModule(shards).train_dataloader()
    with pytest.raises(ValueError, match=r"--data.stream.image_size"):
        ShardDataModule(shards, stream=StreamOptions(epoch_records=4)).train_dataloader()
    with pytest.raises(FileNotFoundError, match="no dataset folder"):
        ShardDataModule(str(tmp_path / "missing")).train_dataloader()


def test_datamodule_streams(shards):
    data = ShardDataModule(shards, batch_size=16, stream=OPTIONS)
    assert (data.folder, data.dataset_hash, data.num_classes) == (None, None, None)
    assert data.image_shape == (3, 8, 8)
    loader = data.train_dataloader()
    assert len(loader) == 3 == len(list(loader))
