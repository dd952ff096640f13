"""Shards and traces on disk, read back by webdataset and pyarrow rather than by our reader."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from pyarrow import parquet

from memfree.images import from_bytes, from_png, to_bytes, to_png
from memfree.sampling import SampleBatch, SampleRun, SampleWriter
from memfree.sampling.writer import summaries, trace_table

KEYS = ["a", "b", "c"]


def batch(indices, steps=4, shape=(1, 5, 3), seed=0, traced=True):
    random = np.random.default_rng(seed)
    count = len(indices)
    trace = {
        "sample": torch.arange(count).repeat(steps),
        "step": torch.arange(steps).repeat_interleave(count),
        "t": torch.arange(steps).flip(0).repeat_interleave(count).float(),
        "sigma": torch.tensor(random.normal(size=count * steps), dtype=torch.float32),
        "lambda": torch.full((count * steps,), -0.7),
        "active": torch.tensor(random.random(count * steps) < 0.5),
        "nearest": torch.tensor(random.integers(0, 3, count * steps)),
        "g_sim_norm": torch.full((count * steps,), float("nan")),
        "extra": torch.ones(count * steps),
    }
    return SampleBatch(
        index=torch.tensor(indices),
        images=torch.tensor(random.uniform(-1.2, 1.2, (count, *shape)), dtype=torch.float32),
        conditions=[i % 10 for i in indices],
        trace=trace if traced else None,
        seconds=2.0,
    )


def write(run, batches, batches_per_shard=1, keys=KEYS):
    writer = SampleWriter(run, 5, "amg", keys, batches_per_shard)
    trainer = SimpleNamespace(global_rank=0)
    module = SimpleNamespace(device=torch.device("cpu"))
    writer.on_predict_start(trainer, module)
    for number, one in enumerate(batches):
        writer.on_predict_batch_end(trainer, module, one, one.index, number)
    writer.on_predict_end(trainer, module)


@pytest.fixture
def run(tmp_path):
    made = SampleRun(tmp_path / "out", {}, count=100)
    made.begin()
    yield made
    made.release()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_png_round_trip(shape):
    images = torch.rand(4, *shape) * 2.4 - 1.2
    stored = to_bytes(images)
    expected = np.rint((np.clip(images.numpy(), -1, 1) + 1) * 127.5)
    assert np.array_equal(stored.numpy(), expected)
    for image in stored:
        data = to_png(image)
        assert torch.equal(from_png(data, shape[0]), image)
        other = np.asarray(Image.open(io.BytesIO(data))).reshape(*shape[1:], -1).transpose(2, 0, 1)
        assert np.array_equal(other, image.numpy())
    error = (from_bytes(stored) - images.clamp(-1, 1)).abs().max()
    assert error <= 1 / 255 + 1e-6
    assert torch.equal(to_bytes(from_bytes(stored)), stored)


def test_shard_is_a_webdataset(run):
    one = batch([7, 3])
    write(run, [one])
    shard = run.folder / "samples-000-000000.tar"
    records = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [record["__key__"] for record in records] == ["00000007", "00000003"]
    for row, record in enumerate(records):
        meta = json.loads(record["json"])
        assert meta["index"] == one.index[row]
        assert meta["seed"] == 5
        assert meta["condition"] == one.conditions[row]
        assert meta["mitigation"] == "amg"
        assert meta["seconds"] == 1.0
        assert meta["peak_memory_bytes"] > 10_000_000
        assert torch.equal(from_png(record["png"], 1), to_bytes(one.images[row]))


def test_records_summarise_the_trace(run):
    one = batch([7, 3, 12], steps=6, seed=3)
    peaks, nearest, active = summaries(one, KEYS)
    for row in range(3):
        mine = [i for i in range(18) if one.trace["sample"][i] == row]
        assert peaks[row] == pytest.approx(max(float(one.trace["sigma"][i]) for i in mine))
        assert active[row] == sum(bool(one.trace["active"][i]) for i in mine)
        last = max(mine, key=lambda i: int(one.trace["step"][i]))
        assert nearest[row] == KEYS[int(one.trace["nearest"][last])]


def test_trace_table(run):
    one = batch([7, 3], steps=4)
    table = trace_table(one.index, one.trace, KEYS)
    known = ["sample", "step", "t", "sigma", "lambda", "active", "nearest", "g_sim_norm"]
    assert table.column_names == [*known, "extra"]
    assert table["sample"].to_pylist() == [7, 3] * 4
    assert table["nearest"].to_pylist() == [KEYS[i] for i in one.trace["nearest"].tolist()]
    assert table["g_sim_norm"].null_count == 8
    assert np.array_equal(table["sigma"].to_numpy(), one.trace["sigma"].numpy())


def test_batches_are_collected_and_the_rest_is_written(run):
    write(run, [batch([0, 1]), batch([2]), batch([3, 4])], batches_per_shard=2)
    names = sorted(path.name for path in run.folder.iterdir() if path.name.startswith("samples"))
    assert names == ["samples-000-000000.tar", "samples-000-000001.tar"]
    assert run.missing() == list(range(5, 100))
    traces = [parquet.read_table(path) for path in sorted(run.folder.glob("trace-*.parquet"))]
    assert [table.num_rows for table in traces] == [12, 8]


def test_a_second_run_writes_new_shards(run):
    write(run, [batch([0, 1])])
    before = (run.folder / "samples-000-000000.tar").read_bytes()
    write(run, [batch([2])])
    assert (run.folder / "samples-000-000000.tar").read_bytes() == before
    assert run.missing()[0] == 3


def test_without_trace_there_is_no_trace_file(run):
    write(run, [batch([0], traced=False)], keys=None)
    assert not list(run.folder.glob("trace-*"))
    record = next(iter(wds.WebDataset(str(run.shards()[0]), shardshuffle=False)))
    meta = json.loads(record["json"])
    assert (meta["peak_sigma"], meta["nearest"], meta["active_steps"]) == (None, None, 0)


def test_a_shard_appears_whole_or_not_at_all(run, monkeypatch):
    def broken(path, records, images):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("memfree.sampling.writer.write_shard", broken)
    with pytest.raises(OSError, match="No space"):
        write(run, [batch([0])])
    assert run.shards() == []
    run.clean_up()
    assert {p.name for p in run.folder.iterdir()} == {"run.json", ".lock-000"}
