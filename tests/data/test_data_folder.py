"""Opening a dataset folder, and everything that may be wrong with one."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from memfree.data import DatasetFolder


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / "copy")


def test_batches_are_the_images_in_order(digits_folder):
    part = DatasetFolder(digits_folder).part("train")
    batches = list(part.batches(25))
    assert [len(batch) for batch in batches] == [25, 25, 10]
    assert torch.equal(torch.cat(batches), part.images())
    assert part.rows.tolist() == list(range(60))


def test_unknown_and_empty_parts(folder, tmp_path):
    opened = DatasetFolder(folder)
    with pytest.raises(ValueError, match="'validation' is not a part of a dataset"):
        opened.part("validation")
    opened.items = opened.items.filter(pa.compute.field("part") != "fit")
    with pytest.raises(ValueError, match="has no fit images; prepare it again with --parts.fit"):
        opened.part("fit")


def test_missing_unfinished_and_foreign_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset folder at"):
        DatasetFolder(tmp_path / "missing")
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    for change, message in (
        ({"kind": "model"}, "holds 'model', not a dataset folder"),
        ({"format": 99}, "has format 99"),
        ({"image_shape": None}, "manifest.json is damaged"),
    ):
        manifest.write_text(json.dumps({**value, **change}))
        with pytest.raises(ValueError, match=message):
            DatasetFolder(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match="is not a finished dataset folder"):
        DatasetFolder(folder)


def test_shards_are_compared_with_the_manifest(folder, caplog):
    shard = folder / "test-000001.tar"
    data = shard.read_bytes()
    changed = bytearray(data)
    changed[1500] ^= 1
    shard.write_bytes(changed)
    DatasetFolder(folder)
    with pytest.raises(ValueError, match=r"test-000001.tar does not have the SHA-256"):
        DatasetFolder(folder, verify=True)
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"test-000001.tar has \d+ bytes, its manifest says"):
        DatasetFolder(folder)
    DatasetFolder(folder, on_error="skip")
    (message,) = caplog.messages
    assert "1 shard damaged or missing; first" in message and "test-000001.tar has" in message
    shard.unlink()
    with pytest.raises(ValueError, match=r"test-000001.tar is missing"):
        DatasetFolder(folder)


def test_damaged_record_is_named(folder):
    opened = DatasetFolder(folder)
    row = opened.part_records("test").to_pylist()[5]
    shard = folder / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + 60] ^= 255
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"test-000000.tar, record \d+: damaged"):
        opened.part("test").images()


def test_changed_tables_are_noticed(folder):
    items = pq.read_table(folder / "items.parquet")
    copies = items.column_names.index("copies")
    pq.write_table(
        items.set_column(copies, "copies", pa.array([1] * len(items))), folder / "items.parquet"
    )
    with pytest.raises(ValueError, match="was changed after it was prepared"):
        DatasetFolder(folder)
    (folder / "items.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="items.parquet is damaged"):
        DatasetFolder(folder)
    (folder / "items.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="items.parquet is missing"):
        DatasetFolder(folder)


@pytest.mark.parametrize(("column", "value"), [("shard", "../../secret"), ("row", 10**6)])
def test_hostile_index_opens_nothing(folder, column, value):
    records = pq.read_table(folder / "records.parquet")
    values = [value, *records[column].to_pylist()[1:]]
    place = records.column_names.index(column)
    changed = records.set_column(place, column, pa.array(values, records.schema.field(place).type))
    pq.write_table(changed, folder / "records.parquet")
    with pytest.raises(ValueError, match="records.parquet does not belong to its manifest"):
        DatasetFolder(folder).part("train")


def test_hostile_shard_name_in_the_manifest(folder):
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    value["shards"]["../other.tar"] = {"records": 1, "bytes": 1, "sha256": "0"}
    manifest.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="'../other.tar', not a shard"):
        DatasetFolder(folder)
