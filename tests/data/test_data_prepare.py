"""The dataset folder: what is written, that it is repeatable, and that nothing else is touched."""

import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, PartSizes
from memfree.data.build import Items
from memfree.data.shard_writer import ShardWriter
from memfree.data.skipped import INCOMPLETE
from memfree.folders import atomic

SMALL = PartSizes(train=60, calibration=40, test=30, fit=20)
PLAN = DuplicationPlan(images=4, factor=8)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_default_digits_split(tmp_path):
    prepare(tmp_path / "out", plan=DuplicationPlan(images=16, factor=64))
    folder = DatasetFolder(tmp_path / "out", verify=True)
    parts = {name: folder.part(name) for name in ("train", "calibration", "test", "fit")}
    assert [len(part) for part in parts.values()] == [500, 600, 500, 197]
    assert folder.image_shape == (1, 8, 8) and folder.num_classes == 10
    assert len({key for part in parts.values() for key in part.keys}) == 1797
    groups = [set(part.groups) for part in parts.values()]
    assert sum(len(group) for group in groups) == len(set.union(*groups))  # no group crosses
    assert len(set.union(*groups)) == 1790  # nine pairs, see test_data_grouping
    assert Counter(parts["train"].copies.tolist()) == {1: 484, 64: 16}
    assert folder.manifest["parts"]["train"]["records"] == 484 + 16 * 64
    digits = load_digits()
    for part in parts.values():
        numbers = [int(key.split("-")[1]) for key in part.keys]
        expected = np.rint(digits.images[numbers] * (255 / 16)) / 127.5 - 1
        assert part.images().dtype == torch.float32
        assert np.abs(part.images()[:, 0].numpy() - expected).max() < 1e-6
        assert part.labels.tolist() == digits.target[numbers].tolist()
        assert part.captions is None


def test_shards_are_what_webdataset_reads(digits_folder):
    import webdataset as wds

    shards = sorted(str(path) for path in digits_folder.glob("train-*.tar"))
    assert len(shards) == 5
    records = list(wds.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    train = DatasetFolder(digits_folder).part("train")
    assert len(records) == 88
    assert Counter(record["json"]["image_key"] for record in records) == dict(
        zip(train.keys, train.copies.tolist(), strict=True)
    )
    labels = dict(zip(train.keys, train.labels.tolist(), strict=True))
    group = dict(zip(train.keys, train.groups, strict=True))
    images = dict(zip(train.keys, train.images(), strict=True))
    for record in records:
        meta = record["json"]
        key = meta["image_key"]
        assert int(record["cls"]) == meta["label"] == labels[key]
        assert meta["group"] == group[key] and meta["caption"] is None
        image = record["png"][..., 0] / 127.5 - 1
        assert np.abs(image - images[key][0].numpy()).max() < 1e-6
    repeated = Counter(train.copies.tolist())
    assert repeated == {1: 56, 8: 4}
    spread = Counter(path.split("/")[-1] for path in (record["__url__"] for record in records))
    assert list(spread.values()) == [20, 20, 20, 20, 8]
    copies = {key: [] for key in train.keys}
    for position, record in enumerate(records):
        copies[record["json"]["image_key"]].append((record["json"]["copy"], position))
    for found in copies.values():
        assert sorted(number for number, _ in found) == list(range(len(found)))
    places = [position for found in copies.values() if len(found) == 8 for _, position in found]
    assert max(places) - min(places) > 60  # spread over the shards


def test_same_arguments_same_bytes(tmp_path, digits_folder):
    prepare(tmp_path / "again", parts=SMALL, plan=PLAN, records_per_shard=20)
    first, second = files(digits_folder), files(tmp_path / "again")
    assert first.keys() == second.keys()
    for name in first.keys() - {"manifest.json"}:
        assert first[name] == second[name], name
    prepare(
        tmp_path / "other",
        parts=SMALL,
        plan=DuplicationPlan(images=4, factor=8, seed=1),
        records_per_shard=20,
    )
    assert files(tmp_path / "other")["train-000000.tar"] != first["train-000000.tar"]
    assert files(tmp_path / "other")["test-000000.tar"] == first["test-000000.tar"]
    assert DatasetFolder(tmp_path / "other").hash != DatasetFolder(digits_folder).hash
    assert DatasetFolder(tmp_path / "again").hash == DatasetFolder(digits_folder).hash


def test_tars_carry_no_time_or_owner(digits_folder):
    with tarfile.open(digits_folder / "train-000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_our_own_shards_are_a_source(tmp_path, digits_folder):
    prepare(
        tmp_path / "out",
        "shards",
        str(digits_folder / "train-*.tar"),
        parts=PartSizes(train=50, calibration=10, test=10, fit=10),
    )
    manifest = DatasetFolder(tmp_path / "out").manifest
    assert manifest["grouping"]["exact_duplicates"] == 28
    assert manifest["grouping"]["source_images"] == 88
    assert manifest["num_classes"] == 10


def test_same_command_again_says_so(tmp_path, capsys):
    prepare(tmp_path / "out", parts=SMALL)
    before = files(tmp_path / "out")
    prepare(tmp_path / "out", parts=SMALL)
    assert "already prepared" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_changed_source_is_noticed(tmp_path, make_shard):
    make_shard(tmp_path, 0, 20)
    prepare(tmp_path / "out", "shards", str(tmp_path / "*.tar"), image_size=8)
    prepare(tmp_path / "out", "shards", str(tmp_path / "*.tar"), image_size=8)
    make_shard(tmp_path, 1, 5)
    with pytest.raises(ValueError, match=r"--path .* changed after .*out was prepared"):
        prepare(tmp_path / "out", "shards", str(tmp_path / "*.tar"), image_size=8)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    prepare(tmp_path / "out", "shards", str(tmp_path / "*.tar"), image_size=8)


def test_manifest_says_what_was_done(digits_folder):
    manifest = DatasetFolder(digits_folder).manifest
    assert manifest["source"]["name"] == "digits" and "CC BY 4.0" in manifest["source"]["licence"]
    assert manifest["plan"]["images"] == 4 and manifest["plan"]["factor"] == 8
    assert manifest["made_by"]["seed"] == 0 and manifest["repeated_images"] == 4
    assert manifest["parts"]["train"] == {
        "records": 88,
        "images": 60,
        "groups": 60,
        "requested": 60,
    }
    assert manifest["shards"]["train-000000.tar"]["records"] == 20


def test_another_data_set_is_not_overwritten(tmp_path):
    prepare(tmp_path / "out", parts=SMALL)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="seed is 0 there and 1 here; .*--overwrite"):
        prepare(tmp_path / "out", parts=SMALL, seed=1)
    assert files(tmp_path / "out") == before
    prepare(tmp_path / "out", parts=SMALL, seed=1, overwrite=True)
    assert files(tmp_path / "out") != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        prepare(tmp_path / "out", parts=SMALL, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--out .* is a file"):
        prepare(tmp_path / "file", parts=SMALL, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.md", "labels.csv", "train-backup.tar", "own/a.txt"])
def test_own_files_beside_a_dataset_are_not_replaced(tmp_path, name):
    prepare(tmp_path / "out", parts=SMALL)
    file = tmp_path / "out" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("years of work")
    with pytest.raises(ValueError, match=f"--out .* {name.split('/')[0]}"):
        prepare(tmp_path / "out", parts=SMALL, seed=1, overwrite=True)
    assert file.read_text() == "years of work"
    prepare(tmp_path / "out", parts=SMALL)  # is done: nothing is replaced


@pytest.mark.parametrize("change", ["remove", "shorten", "overwrite"])
@pytest.mark.parametrize(
    "name", ["train-000000.tar", "test-000000.tar", "items.parquet", "records.parquet"]
)
def test_a_damaged_dataset_is_not_called_done(tmp_path, name, change):
    prepare(tmp_path / "out", parts=SMALL)
    file = tmp_path / "out" / name
    if change == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if change == "shorten" else b"PAR1")
    with pytest.raises(ValueError, match=f"--overwrite true: .*{name}"):
        prepare(tmp_path / "out", parts=SMALL)
    prepare(tmp_path / "out", parts=SMALL, overwrite=True)
    prepare(tmp_path / "out", parts=SMALL)


def test_stopped_run_leaves_nothing_and_begins_again(tmp_path, monkeypatch):
    write = ShardWriter.write

    def interrupted(self, part, *arguments):
        if part == "test":
            raise KeyboardInterrupt
        write(self, part, *arguments)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", parts=SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    prefix = f".out.{atomic.socket.gethostname()}-"
    left = tmp_path / f"{prefix}4194304999.partial"  # of a killed process: no such number exists
    left.mkdir()
    (left / "train-000000.tar").write_bytes(b"half")
    alive = tmp_path / f"{prefix}1.partial"  # of a process that runs
    alive.mkdir()
    prepare(tmp_path / "out", parts=SMALL)
    assert not left.exists() and alive.exists()
    DatasetFolder(tmp_path / "out", verify=True)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="needs about .* MB, but only"):
        prepare(tmp_path / "out", parts=SMALL)
    monkeypatch.undo()

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(OSError, match=r"the disk of .*out is full; nothing was written"):
        prepare(tmp_path / "out", parts=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_broken_images_are_counted(tmp_path, encode, capsys):
    generator = np.random.default_rng(0)
    source = tmp_path / "images"
    source.mkdir()
    for number in range(20):
        pixels = generator.integers(0, 256, (8, 8)).astype(np.uint8)
        (source / f"{number:02d}.png").write_bytes(encode(pixels))
    (source / "07.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"07.png: not a PNG"):
        prepare(tmp_path / "out", "folder", str(source))
    assert not (tmp_path / "out").exists()
    command = ["prepare", f"--out={tmp_path / 'out'}", "--source=folder", f"--path={source}"]
    # So a script learns of it, also where the same command does nothing.
    assert [entry.main([*command, "--on_error=skip"]) for _ in range(2)] == [INCOMPLETE] * 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"]["images"] == 1 and "07.png" in manifest["skipped"]["first"][0]
    assert manifest["skipped"]["shards"] == []
    assert manifest["grouping"]["source_images"] == 19
    first, again = capsys.readouterr().err.splitlines()[-2:]
    assert "; 1 of 20 images skipped, see its manifest" in first
    assert again.endswith(
        "is already prepared in this way; images or shards were skipped, see its manifest"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": PartSizes(train=5000)}, "the parts want"),
        ({"records_per_shard": 0}, "--records_per_shard 0"),
        ({"image_size": 0}, "--image_size 0"),
        ({"near_distance": float("nan")}, "--near_distance nan"),
        ({"near_distance": float("inf")}, "--near_distance inf"),
        ({"plan": DuplicationPlan(images=501, factor=2)}, "--plan wants to repeat 501 images"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["seed", "near_distance", "plan.seed"])
@pytest.mark.parametrize("value", ["-1", "9" * 5000])
def test_numbers_out_of_range_name_their_option(tmp_path, capsys, option, value):
    if (option, value[0]) == ("near_distance", "9"):
        value = "nan"
    with pytest.raises(SystemExit) as exit_:
        entry.main(["prepare", f"--out={tmp_path / 'out'}", f"--{option}={value}"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and f"--{option}" in said and len(said) < 1000


def test_part_without_room_for_any_group_is_refused(tmp_path, encode):
    source = tmp_path / "images"
    source.mkdir()
    for number in range(20):  # all the same
        (source / f"{number:02d}.png").write_bytes(encode(np.eye(8, dtype=np.uint8) * 255))
    with pytest.raises(ValueError, match="no group of images is small enough"):
        prepare(tmp_path / "out", "folder", str(source))


def test_any_size_and_channels(tmp_path, encode):
    generator = np.random.default_rng(0)
    source = tmp_path / "images"
    source.mkdir()
    for number in range(12):
        pixels = generator.integers(0, 256, (20 + number, 31, 4)).astype(np.uint8)
        (source / f"{number:02d}.png").write_bytes(encode(pixels))
    prepare(
        tmp_path / "out",
        "folder",
        str(source),
        image_size=(6, 10),
        channels=2,
        parts=PartSizes(train=6, calibration=2, test=2, fit=2),
    )
    folder = DatasetFolder(tmp_path / "out")
    assert folder.image_shape == (2, 6, 10)
    assert folder.part("train").images().shape == (6, 2, 6, 10)


def test_index_points_at_the_images(digits_folder):
    table = pq.read_table(digits_folder / "records.parquet").to_pylist()
    assert Counter(row["part"] for row in table) == {
        "train": 88,
        "calibration": 40,
        "test": 30,
        "fit": 20,
    }
    for row in table[::7]:
        data = (digits_folder / row["shard"]).read_bytes()
        assert data[row["offset"] :][:8] == b"\x89PNG\r\n\x1a\n"
        assert data[row["offset"] + row["size"] - 8 :][:4] == b"IEND"


def test_items_agree_with_records(digits_folder):
    items = pq.read_table(digits_folder / "items.parquet")
    records = pq.read_table(digits_folder / "records.parquet")
    assert items.column_names == ["image_key", "group", "copies", "part"]
    assert Counter(records["row"].to_pylist()) == dict(enumerate(items["copies"].to_pylist()))
    assert Items().copies() == []


def test_a_folder_is_named_as_it_is(tmp_path, capfd):
    out = tmp_path / "[/o]"
    for line in (f"{out}: records: train 60", f"{out} is already prepared in this way"):
        prepare(out, parts=SMALL)
        assert line in capfd.readouterr().err
