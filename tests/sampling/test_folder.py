"""SampleFolder gives back what was written, in order, and refuses what is damaged."""

import json

import pytest
import torch
import webdataset as wds
from test_writer import KEYS, batch, write

from memfree.images import to_bytes, to_png
from memfree.sampling import SampleFolder, SampleRun


def finished(folder, batches, keys=KEYS):
    count = sum(len(one.index) for one in batches)
    run = SampleRun(folder, {}, count=count)
    run.begin()
    write(run, batches, keys=keys)
    run.finish(5, mitigation="amg", image_shape=[1, 5, 3])
    run.release()
    return SampleFolder(folder)


@pytest.fixture
def batches():
    return [batch([5, 0, 3], seed=1), batch([1, 4], seed=2), batch([2], seed=3)]


def test_samples_come_in_the_order_of_their_index(tmp_path, batches):
    folder = finished(tmp_path / "out", batches)
    order = torch.cat([one.index for one in batches]).argsort()
    images = to_bytes(torch.cat([one.images for one in batches])[order])
    assert len(folder) == 6
    assert torch.equal(to_bytes(folder.images()), images)
    assert folder.images().dtype == torch.float32
    assert [len(part) for part in folder.batches(4)] == [4, 2]
    assert torch.equal(torch.cat(list(folder.batches(4))), folder.images())
    assert folder.index.tolist() == list(range(6))
    assert folder.conditions.tolist() == list(range(6))
    assert folder.seeds.tolist() == [5] * 6
    assert folder.records["index"].to_pylist() == list(range(6))
    assert folder.manifest["seed"] == 5
    assert folder.manifest["mitigation"] == "amg"


def test_trace_is_sorted(tmp_path, batches):
    trace = finished(tmp_path / "out", batches).trace()
    assert trace["sample"].to_pylist() == [i for i in range(6) for _ in range(4)]
    assert trace["step"].to_pylist() == list(range(4)) * 6
    one = batches[0]  # sample 0 is row 1 of the first batch
    mine = one.trace["sample"] == 1
    assert trace["sigma"].to_pylist()[:4] == one.trace["sigma"][mine].tolist()


def test_without_index_there_is_no_trace(tmp_path):
    folder = finished(tmp_path / "out", [batch([0, 1], traced=False)], keys=None)
    with pytest.raises(ValueError, match="has no trace"):
        folder.trace()


def test_missing_and_unfinished_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no samples folder"):
        SampleFolder(tmp_path / "nowhere")
    run = SampleRun(tmp_path / "out", {}, count=2)
    run.begin()
    with pytest.raises(ValueError, match="not a finished samples folder"):
        SampleFolder(tmp_path / "out")
    run.release()


def damage_tail(path):
    path.write_bytes(path.read_bytes()[:700])


def damage_png(path):
    data = path.read_bytes()
    at = data.index(b"\x89PNG")
    path.write_bytes(data[:at] + bytes(60) + data[at + 60 :])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("samples-000-000001.tar", lambda path: path.unlink(), "000001.tar is missing"),
        ("samples-000-000001.tar", damage_tail, "000001.tar is damaged"),
        ("samples-000-000001.tar", damage_png, "image of sample 1 is damaged"),
        ("trace-000-000001.parquet", lambda path: path.unlink(), "trace"),
        ("trace-000-000001.parquet", lambda path: path.write_bytes(b"x"), "trace"),
    ],
)
def test_damage_is_named(tmp_path, batches, name, damage, message):
    folder = finished(tmp_path / "out", batches)
    damage(folder.path / name)
    with pytest.raises(ValueError, match=message):
        SampleFolder(folder.path).images()
        folder.trace()


@pytest.mark.parametrize("field", ["made_by", "image_shape", "shards", "count"])
def test_a_manifest_that_lacks_something_is_named(tmp_path, batches, field):
    path = finished(tmp_path / "out", batches).path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: manifest[key] for key in manifest if key != field}))
    with pytest.raises(ValueError, match=f"manifest.json lacks '{field}'; draw the samples again"):
        SampleFolder(path.parent)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"seed": 5, "condition": 1}, "00000001.json has no valid index"),
        ({"index": "1", "seed": 5, "condition": 1}, "00000001.json has no valid index"),
        ({"index": 1, "condition": 1}, "00000001.json has no valid seed"),
        ({"index": 1, "seed": 5}, "00000001.json has no valid condition"),
        ([], "00000001.json is not a record of a sample"),
    ],
)
def test_a_record_that_lacks_something_is_named(tmp_path, batches, record, message):
    folder = finished(tmp_path / "out", batches)
    shard = folder.path / "samples-000-000001.tar"
    pixels = to_png(torch.zeros(1, 5, 3, dtype=torch.uint8))
    with wds.TarWriter(str(shard), encoder=False) as tar:
        data = json.dumps(record).encode()
        tar.write({"__key__": "00000001", "png": pixels, "json": data})
    with pytest.raises(ValueError, match=f"{shard.name} is damaged: {message}"):
        SampleFolder(folder.path)


def test_a_lost_sample_is_noticed(tmp_path, batches):
    folder = finished(tmp_path / "out", batches)
    (folder.path / "samples-000-000001.tar").write_bytes(
        (folder.path / "samples-000-000000.tar").read_bytes()
    )
    with pytest.raises(ValueError, match="repeats sample"):
        SampleFolder(folder.path)
