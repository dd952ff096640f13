"""Shards as img2dataset leaves them, prepared and streamed as they are, with their captions."""

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import picture

from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, ShardDataModule, StreamOptions

SHARD = 10


def caption_of(key):
    return f"a café, number {key}"


def write_download(folder, encode, tar, shards=3):
    """What img2dataset writes: tars, a .parquet and a _stats.json beside each.

    One of the ten rows of a shard failed: it has a row in the parquet and no files in the tar.
    """
    folder.mkdir()
    for shard in range(shards):
        members, rows = [], []
        for position in range(SHARD):
            key = f"{shard:05d}{position:04d}"
            failed = position == 7
            image = encode(picture(100 * shard + position, 16, 20), "JPEG", quality=95)
            row = {
                "url": f"https://example.org/{key}.jpg",
                "caption": caption_of(key),
                "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: Not Found" if failed else None,
                "width": None if failed else 20,
                "height": None if failed else 16,
                "original_width": None if failed else 640,
                "original_height": None if failed else 512,
                "exif": None if failed else "{}",
                "sha256": None if failed else hashlib.sha256(image).hexdigest(),
            }
            rows.append(row)
            if not failed:
                members += [
                    (f"{key}.jpg", image),
                    (f"{key}.json", json.dumps(row, indent=4).encode()),
                    (f"{key}.txt", row["caption"].encode()),
                ]
        tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        stats = {"count": SHARD, "successes": SHARD - 1, "failed_to_download": 1}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture
def download(tmp_path, encode, tar):
    return write_download(tmp_path / "download", encode, tar)


def own(key):
    return caption_of(key.split("/")[1])


def test_prepared(tmp_path, download):
    plan = DuplicationPlan(images=2, factor=4)
    prepare(tmp_path / "out", "shards", str(download), image_size=8, plan=plan)
    folder = DatasetFolder(tmp_path / "out", verify=True)
    assert folder.manifest["captions"] and folder.num_classes is None
    assert folder.image_shape == (3, 8, 8)
    keys = set()
    for name in ("train", "calibration", "test", "fit"):
        part = folder.part(name)
        assert part.captions == [own(key) for key in part.keys]
        keys |= set(part.keys)
    assert len(keys) == 27 and not any(key.endswith("7") for key in keys)
    data = ShardDataModule(str(tmp_path / "out"), batch_size=8)
    batches = list(data.train_dataloader())
    pairs = Counter(p for b in batches for p in zip(b["key"], b["caption"], strict=True))
    assert all(caption == own(key) for key, caption in pairs)
    train = len(folder.part("train"))
    assert Counter(pairs.values()) == {1: train - 2, 4: 2}


@pytest.mark.parametrize(
    ("address", "workers"),
    [("download", 0), ("download/*.tar", 0), ("download/{00000..00002}.tar", 2)],
)
def test_streamed_as_they_are(tmp_path, download, address, workers):
    options = StreamOptions(epoch_records=27, image_size=(16, 20), captions=True)
    data = ShardDataModule(
        str(tmp_path / address), batch_size=8, num_workers=workers, stream=options
    )
    assert data.folder is None and data.image_shape == (3, 16, 20)
    batches = list(data.train_dataloader())
    found = [pair for b in batches for pair in zip(b["key"], b["caption"], strict=True)]
    assert len(found) == 27 and all(caption == own(key) for key, caption in found)
    if workers == 0:  # with workers, shares of shards are not exactly even
        assert len({key for key, _ in found}) == 27
    for batch in batches:  # the picture under each key is the one that was stored
        for key, image in zip(batch["key"], batch["image"], strict=True):
            shard, position = int(key[:5]), int(key[-4:])
            stored = picture(100 * shard + position, 16, 20).transpose(2, 0, 1) / 127.5 - 1
            assert np.corrcoef(image.numpy().ravel(), stored.ravel())[0, 1] > 0.5


def test_caption_only_in_the_json(tmp_path, encode, tar):
    members = []
    for number in range(4):
        members += [
            (f"{number}.jpg", encode(picture(number), "JPEG")),
            (f"{number}.json", json.dumps({"caption": f"thing {number}", "sha256": "0"}).encode()),
        ]
    tar(tmp_path / "00000.tar", members)
    options = StreamOptions(epoch_records=4, image_size=8, captions=True)
    data = ShardDataModule(str(tmp_path), batch_size=4, stream=options)
    (batch,) = data.train_dataloader()
    assert sorted(batch["caption"]) == [f"thing {number}" for number in range(4)]


def test_downloads_without_captions(tmp_path, encode, tar):
    meta = json.dumps({"caption": None, "url": "https://example.org", "sha256": "0"}).encode()
    members = []
    for number in range(4):
        members += [(f"{number}.jpg", encode(picture(number), "JPEG")), (f"{number}.json", meta)]
    tar(tmp_path / "00000.tar", members)
    prepare(tmp_path / "out", "shards", str(tmp_path / "00000.tar"), image_size=8)
    assert not DatasetFolder(tmp_path / "out").manifest["captions"]
    options = StreamOptions(epoch_records=4, image_size=8, captions=True)
    data = ShardDataModule(str(tmp_path / "00000.tar"), batch_size=4, stream=options)
    with pytest.raises(ValueError, match="record without a caption"):
        list(data.train_dataloader())
