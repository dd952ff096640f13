"""What is left out is said and counted: missing shards, broken records, images in no part."""

import json

import numpy as np
import pytest
from epochs import epoch_of

from memfree.commands.prepare import prepare
from memfree.data import PartSizes, ShardDataModule, StreamOptions
from memfree.data.batches import ForeignBatches, RankOptions
from memfree.data.ingest import Framing, ingest
from memfree.data.shard_reader import expand_shards
from memfree.data.skipped import Skipped
from memfree.data.sources import Shards

OPTIONS = StreamOptions(epoch_records=40, image_size=8)


def random_images(folder, count, encode):
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = generator.integers(0, 256, (8, 8)).astype(np.uint8)
        (folder / f"{number:03d}.png").write_bytes(encode(pixels))
    return str(folder)


def test_missing_shards_are_an_error_or_counted(tmp_path, make_shard):
    for number in range(3):
        make_shard(tmp_path, number, 2)
    pattern = str(tmp_path / "{00000..00009}.tar")
    first, frame = str(tmp_path / "00003.tar"), Framing(8, 8, 3)
    with pytest.raises(FileNotFoundError, match=f"^7 of 10 shards are missing.*{first}"):
        expand_shards(pattern)
    with pytest.raises(FileNotFoundError, match="^1 of 4 shards is missing"):
        expand_shards(str(tmp_path / "{00000..00003}.tar"))
    with pytest.raises(FileNotFoundError, match="no tar shards at"):
        expand_shards(str(tmp_path / "{00004..00006}.tar"), Skipped())
    with pytest.raises(FileNotFoundError, match="7 of 10 shards are missing"):
        ingest(Shards(pattern), frame, tmp_path / "px.tmp", None)
    (tmp_path / "px.tmp").unlink()
    skipped = Skipped()
    assert len(ingest(Shards(pattern), frame, tmp_path / "px.tmp", skipped).names) == 6
    assert len(skipped.shards) == 7 and first in skipped.shards and skipped.records == 0
    assert skipped.messages[0] == f"shard {first} is missing"


def test_broken_shards_and_images_are_told_apart(tmp_path, make_shard, tar, encode, capsys):
    for number in range(4):
        make_shard(tmp_path, number, 10)
    cut = tmp_path / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:6000])
    good = encode(np.full((9, 9, 3), 40, np.uint8))
    tar(tmp_path / "00004.tar", [("1.png", good), ("1.txt", b"a"), ("2.txt", b"no image")])
    pattern = str(tmp_path / "{00000..00005}.tar")
    with pytest.raises(FileNotFoundError, match="1 of 6 shards is missing, the first is .*00005"):
        prepare(tmp_path / "out", "shards", pattern, image_size=8)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", "shards", pattern, image_size=8, on_error="skip")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"]["shards"] == [str(cut), str(tmp_path / "00005.tar")]
    images = manifest["grouping"]["source_images"]
    assert manifest["skipped"]["images"] == 1 and 31 <= images < 41
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"1 of {images + 1} images skipped, 2 shards damaged or missing" in line


def test_no_image_is_left_out_unless_it_is_said(tmp_path, encode, capsys):
    source = random_images(tmp_path / "images", 79, encode)
    prepare(tmp_path / "all", "folder", source)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("records: train 58, calibration 7, test 7, fit 7")
    prepare(tmp_path / "some", "folder", source, parts=PartSizes(calibration=0))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("calibration 0, test 7, fit 7; 8 of 79 images left out, in no part")


def test_too_few_calibration_images_are_said(tmp_path, encode, capsys):
    source = random_images(tmp_path / "images", 80, encode)
    prepare(tmp_path / "out", "folder", source)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "false" in line] == [
        f"{tmp_path / 'out'}: a false-positive rate of 1 % needs 500 calibration images; there "
        "are 8: the smallest rate is 62.5 %, use memfree evaluate --false_positive_rate 0.625 "
        "and sample.py --mitigation.false_positive_rate 0.625"
    ]
    prepare(tmp_path / "digits")
    assert "false" not in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_broken_record_is_counted_once_a_pass(tmp_path, tar, encode, world_size):
    good = encode(np.zeros((9, 9, 3), np.uint8))
    members = [(f"{number}.png", good) for number in range(12)]
    tar(tmp_path / "a.tar", [("x.txt", b"no image"), ("y.png", b"broken"), *members])
    options = StreamOptions(epoch_records=12, image_size=8, shuffle_buffer=1)
    skipped = Skipped()
    for rank in range(world_size):
        dataset = ForeignBatches(
            str(tmp_path),
            options,
            RankOptions(4, rank=rank, world_size=world_size, on_error="skip"),
        )
        for batch in epoch_of(dataset):
            skipped.add(batch["skipped"])
    assert skipped.kept == 12
    assert skipped.records == 2, skipped.messages


def test_missing_shards_stop_training_or_are_counted(tmp_path, make_shard, caplog):
    for number in range(4):
        make_shard(tmp_path, number, 10)
    pattern = str(tmp_path / "{00000..00009}.tar")
    message = "6 of 10 shards are missing, the first is .*00004.tar"
    with pytest.raises(FileNotFoundError, match=message):
        ShardDataModule(pattern, stream=OPTIONS).image_shape  # noqa: B018 - asked before writing
    with pytest.raises(FileNotFoundError, match=message):
        ShardDataModule(pattern, stream=OPTIONS).train_dataloader()
    data = ShardDataModule(pattern, batch_size=16, stream=OPTIONS, on_error="skip")
    assert len(list(data.train_dataloader())) == 3
    assert len(data.skipped.shards) == 6 and data.skipped.records == 0
    (line,) = caplog.messages
    assert "skipped 6 shards" in line and "00004.tar is missing" in line


def test_skipped_records_are_named_at_first_and_counted(tmp_path, tar, encode, caplog):
    good = encode(np.zeros((9, 9, 3), np.uint8))
    members = [(f"{number:02d}.png", good if number % 2 else b"broken") for number in range(40)]
    tar(tmp_path / "a.tar", members)
    options = StreamOptions(epoch_records=20, image_size=8)
    data = ShardDataModule(str(tmp_path), batch_size=5, stream=options, on_error="skip")
    loader = data.train_dataloader()
    for _ in range(3):
        assert all("skipped" not in batch for batch in loader)
    assert len(caplog.messages) == 4 and "counted, not named" in caplog.messages[-1]
    assert all("not a PNG" in message for message in caplog.messages[:3])
    skipped = data.skipped.records
    assert 40 < skipped <= 60 and data.skipped.kept == 60
    data.teardown("fit")
    assert caplog.messages[4:] == [f"{skipped} of {skipped + 60} records skipped"]


def test_what_all_ranks_skipped_is_one_sum(monkeypatch):
    data = ShardDataModule("nowhere", on_error="skip")
    data.skipped = Skipped(1, 10, {"a", "b"})

    def gather(into, mine):
        into[:] = [mine, Skipped(2, 20, {"b", "c"})]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert data.skipped_on_all_ranks() == Skipped(3, 30, {"a", "b", "c"})
    assert data.skipped == Skipped(1, 10, {"a", "b"})
