"""One permutation an epoch, equal numbers of batches on all ranks, every record once."""

import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from epochs import epoch_of, keys

from memfree.data import DatasetFolder, ShardDataModule
from memfree.data.batches import (
    EpochBatches,
    EpochLoader,
    RankOptions,
    batches_per_epoch,
    global_slice,
    permutation,
    rank_slice,
)


def numbers(records, batch_size, world_size):
    """Positions of an epoch by (rank, batch)."""
    batches = batches_per_epoch(records, batch_size, world_size)
    return [
        [
            list(range(*rank_slice(*global_slice(records, batches, batch), rank, world_size)))
            for batch in range(batches)
        ]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_every_record_once_in_equal_batches(world_size, batch_size):
    for records in range(world_size, 60):
        ranks = numbers(records, batch_size, world_size)
        assert len({len(batches) for batches in ranks}) == 1
        together = [position for batches in ranks for batch in batches for position in batch]
        assert sorted(together) == list(range(records))
        sizes = [len(batch) for batches in ranks for batch in batches]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 2
        assert max(sizes) <= max(batch_size, 2 if world_size > 1 else 1)


def test_same_global_batch_on_other_ranks():
    one, two = numbers(100, 8, 1), numbers(100, 4, 2)
    assert one[0] == [a + b for a, b in zip(*two, strict=True)]


def test_too_few_records():
    with pytest.raises(ValueError, match="3 training records cannot feed 4 ranks"):
        batches_per_epoch(3, 8, 4)
    with pytest.raises(ValueError, match="1 training record cannot feed 2 ranks"):
        batches_per_epoch(1, 8, 2)
    with pytest.raises(ValueError, match="--data.batch_size 0"):
        batches_per_epoch(3, 0, 1)


def test_permutation_depends_on_seed_and_epoch():
    first = permutation(100, 1, 2)
    assert sorted(first) == list(range(100))
    assert (first == permutation(100, 1, 2)).all()
    assert (first != permutation(100, 1, 3)).any() and (first != permutation(100, 2, 2)).any()


def records_in_order(folder, epoch, seed=0):
    """Image keys of the epoch, independently: the index file by the permutation."""
    items = pq.read_table(folder / "items.parquet")["image_key"].to_pylist()
    rows = [
        row["row"]
        for row in pq.read_table(folder / "records.parquet").to_pylist()
        if row["part"] == "train"
    ]
    return [items[rows[number]] for number in permutation(len(rows), seed, epoch)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(digits_folder, workers):
    dataset = EpochBatches(DatasetFolder(digits_folder), RankOptions(16))
    at = [0, 0]
    loader = EpochLoader(dataset, workers, lambda: tuple(at), lambda batch: None)
    for epoch in (0, 5):
        at[0] = epoch
        batches = list(loader)
        assert keys(batches) == records_in_order(digits_folder, epoch)
        assert [len(batch["key"]) for batch in batches] == [14, 15, 15, 14, 15, 15]
    at[1] = 4
    assert keys(loader) == records_in_order(digits_folder, 5)[58:]
    loader.close()
    assert keys(loader) == records_in_order(digits_folder, 5)[58:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_epoch(digits_folder, world_size):
    folder = DatasetFolder(digits_folder)
    ranks = [
        epoch_of(EpochBatches(folder, RankOptions(6, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    merged = [key for step in zip(*ranks, strict=True) for key in keys(step)]
    assert merged == records_in_order(digits_folder, 0)
    for step in zip(*ranks, strict=True):
        sizes = torch.tensor([len(batch["key"]) for batch in step], dtype=torch.float64)
        weights = torch.tensor([batch["weight"] for batch in step], dtype=torch.float64)
        losses = [torch.rand(int(size), dtype=torch.float64) for size in sizes]
        mean = torch.stack([w * x.mean() for w, x in zip(weights, losses, strict=True)]).mean()
        torch.testing.assert_close(mean, torch.cat(losses).mean())


def test_more_workers_than_shards_and_batches(digits_folder):
    folder = DatasetFolder(digits_folder)
    found = Counter()
    for rank in range(4):
        dataset = EpochBatches(folder, RankOptions(11, rank=rank, world_size=4))
        assert dataset.batches == 2
        found.update(keys(epoch_of(dataset, workers=3)))
    train = folder.part("train")
    assert found == dict(zip(train.keys, train.copies.tolist(), strict=True))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_batches_hold_the_right_images(digits_folder, cache_bytes):
    folder = DatasetFolder(digits_folder)
    train = folder.part("train")
    images = train.images()
    dataset = EpochBatches(folder, RankOptions(16), cache_bytes=cache_bytes)
    for _ in range(2):
        for batch in epoch_of(dataset):
            assert set(batch) == {"image", "key", "row", "weight", "label"}
            assert batch["image"].dtype == torch.float32 and batch["weight"] == 1.0
            assert torch.equal(batch["image"], images[batch["row"]])
            assert torch.equal(batch["label"], train.labels[batch["row"]])
            assert batch["key"] == [train.keys[row] for row in batch["row"]]
    assert (dataset._reader._cached is not None) == (cache_bytes > 0)


def test_cache_has_a_limit(digits_folder):
    folder = DatasetFolder(digits_folder)
    assert EpochBatches(folder, RankOptions(16), cache_bytes=60 * 64)._reader._cached is not None
    assert EpochBatches(folder, RankOptions(16), cache_bytes=60 * 64 - 1)._reader._cached is None


def test_random_flip_depends_on_seed_and_epoch(digits_folder):
    folder = DatasetFolder(digits_folder)
    images = folder.part("train").images()

    def flipped(epoch, world_size=1):
        found = {}
        for rank in range(world_size):
            dataset = EpochBatches(
                folder,
                RankOptions(16 // world_size, rank=rank, world_size=world_size, random_flip=True),
            )
            position = [0] * dataset.batches
            for step, batch in enumerate(epoch_of(dataset, epoch)):
                for image, row in zip(batch["image"], batch["row"], strict=True):
                    is_flipped = torch.equal(image, images[row].flip(-1))
                    assert is_flipped or torch.equal(image, images[row])
                    found[rank, step, position[step]] = is_flipped
                    position[step] += 1
        return [found[at] for at in sorted(found, key=lambda at: (at[1], at[0], at[2]))]

    first = flipped(0)
    assert 20 < sum(first) < 68
    assert first == flipped(0) == flipped(0, world_size=2)
    assert first != flipped(1)


@pytest.fixture
def broken(digits_folder, tmp_path):
    """A dataset with one damaged record of an image that is not repeated; its number too."""
    folder = shutil.copytree(digits_folder, tmp_path / "broken")
    records = DatasetFolder(folder).part_records("train").to_pylist()
    once = Counter(row["row"] for row in records)
    row = next(row for row in records if once[row["row"]] == 1)
    shard = folder / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + 50] ^= 255
    shard.write_bytes(data)
    return folder, row


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_broken_record_stops(broken, cache_bytes):
    folder, row = broken
    message = f"{row['shard']}, record {row['record']}: damaged, its checksum differs"
    with pytest.raises(ValueError, match=message):
        epoch_of(EpochBatches(DatasetFolder(folder), RankOptions(16), cache_bytes=cache_bytes))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_broken_record_is_skipped_and_counted(broken, cache_bytes):
    folder, row = broken
    dataset = EpochBatches(
        DatasetFolder(folder), RankOptions(16, on_error="skip"), cache_bytes=cache_bytes
    )
    batches = epoch_of(dataset)
    assert sum(len(batch["key"]) for batch in batches) == 87
    assert sum(batch["skipped"].kept for batch in batches) == 87
    (message,) = [message for batch in batches for message in batch["skipped"].messages]
    assert f"record {row['record']}: damaged" in message
    assert all(len(batch["image"]) == len(batch["key"]) == len(batch["row"]) for batch in batches)
    assert row["row"] not in torch.cat([batch["row"] for batch in batches])


def test_batch_without_a_readable_record_has_no_weight(broken):
    folder, row = broken
    batches = epoch_of(EpochBatches(DatasetFolder(folder), RankOptions(1, on_error="skip")))
    assert sum(batch["skipped"].kept for batch in batches) == 87
    assert len(batches) == 88
    assert [batch["weight"] for batch in batches].count(0.0) == 1
    assert all(len(batch["key"]) == 1 for batch in batches)


def test_missing_shard_is_skipped_and_counted(digits_folder, tmp_path, caplog):
    folder = shutil.copytree(digits_folder, tmp_path / "copy")
    (folder / "train-000002.tar").unlink()
    data = ShardDataModule(str(folder), batch_size=16)
    with pytest.raises(ValueError, match=r"train-000002.tar is missing"):
        data.train_dataloader()
    data = ShardDataModule(str(folder), batch_size=16, on_error="skip")
    batches = list(data.train_dataloader())
    assert "1 shard damaged or missing; first" in caplog.messages[0]
    assert "train-000002.tar is missing" in caplog.messages[0]
    assert "train-000002.tar cannot be read" in caplog.messages[1]
    skipped = data.skipped.records
    assert skipped > 10 and sum(len(batch["key"]) for batch in batches) == 88 - skipped
    data.teardown("fit")
    assert caplog.messages[-1] == f"{skipped} of 88 records skipped"


def test_captions(tmp_path, make_shard):
    from memfree.commands.prepare import prepare

    make_shard(tmp_path, 0, 20)
    prepare(tmp_path / "out", "shards", str(tmp_path), image_size=8)
    batches = epoch_of(EpochBatches(DatasetFolder(tmp_path / "out"), RankOptions(5)))
    assert len(batches) == 3 and "label" not in batches[0]
    for batch in batches:
        assert batch["caption"] == [f"picture {key.split('/')[1]}" for key in batch["key"]]
        assert np.abs(batch["image"]).max() <= 1
