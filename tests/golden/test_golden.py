"""Golden traces: today's code makes what the code of November 2026 made, and opens it.

Bits of floating-point results depend on the processor and on torch. Where both are those that made
the kept ones (machine.json), bits are compared, elsewhere numbers.
"""

import json
import platform
import shutil
from pathlib import Path

import chain
import numpy as np
import pytest
import torch
import traces
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow


def machine():
    """What the last bits of a result depend on."""
    names = [platform.machine()]
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = cpu.read_text().splitlines()
        names += [line.split(":")[1].strip() for line in lines if line.startswith("model name")][:1]
    return [*names, torch.backends.cpu.get_cpu_capability(), str(torch.__version__)]


KEPT_ON = json.loads((chain.HERE / "machine.json").read_text())
SAME = machine() == KEPT_ON


def assert_equal(now, kept, tolerance=1e-3):
    """Equal bits; on another machine 95 % of the numbers, as a guided sample may go its own way."""
    assert now.dtype == kept.dtype and now.shape == kept.shape
    if SAME:
        np.testing.assert_array_equal(now, kept)
    elif now.dtype.kind in "fc":
        assert np.isclose(now, kept, rtol=tolerance, atol=tolerance, equal_nan=True).mean() >= 0.95
    else:
        assert (now == kept).mean() >= 0.95


def assert_tables_equal(now, kept, names):
    for name in names:
        found, expected = chain.columns(now / name), chain.columns(kept / name)
        assert list(found) == list(expected)
        for column in expected:
            assert_equal(found[column], expected[column])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A copy of the kept folders, in the folder where commands run."""
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(chain.KEPT, root / "kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield Path("kept")


def test_prepare_writes_the_same_bytes(kept, tmp_path):
    chain.prepare(tmp_path / "data")
    assert chain.files(tmp_path / "data") == chain.files(kept / "data")
    tables = ("items.parquet", "records.parquet", "conditions.parquet")
    assert_tables_equal(tmp_path / "data", kept / "data", tables)
    now, then = (
        json.loads((folder / "manifest.json").read_text())
        for folder in (tmp_path / "data", kept / "data")
    )
    assert now.pop("made_by").keys() == then.pop("made_by").keys()
    assert now == then


def test_index_writes_the_same_vectors(kept, tmp_path):
    chain.index(kept / "data", tmp_path / "index")
    now, then = (np.load(folder / "index" / "vectors.npy") for folder in (tmp_path, kept))
    assert_equal(now, then)
    assert_tables_equal(tmp_path / "index", kept / "index", ("items.parquet", "conditions.parquet"))
    now, then = (
        json.loads((folder / "index" / "calibration.json").read_text())
        for folder in (tmp_path, kept)
    )
    assert now.keys() == then.keys()
    for name in then:
        assert_equal(np.array(now[name]["sigmas"]), np.array(then[name]["sigmas"]))


def weights(model):
    return load_file(model / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("stopped", [False, True])
def test_train_makes_the_same_weights_also_from_a_kept_checkpoint(kept, tmp_path, stopped):
    out = tmp_path / "model"
    if stopped:
        shutil.copytree(kept / "stopped", out)
    chain.train(kept / "data", out)
    now, then = weights(out), weights(kept / "model")
    assert now.keys() == then.keys()
    for name in then:
        assert_equal(now[name], then[name], tolerance=0.02)  # Adam divides noise by noise
    assert_tables_equal(out, kept / "model", ("exposures.parquet",))


@pytest.mark.parametrize("mitigation", chain.MITIGATIONS)
def test_sample_draws_the_same_pictures_from_kept_folders(kept, tmp_path, mitigation):
    out, then = tmp_path / "samples", kept / "samples" / mitigation
    chain.sample(kept / "model", kept / "index", mitigation, out)
    now, expected = chain.pictures(out), chain.pictures(then)
    assert now.shape == expected.shape == (12, 8, 8)
    apart = np.abs(now.astype(int) - expected)
    assert apart.max() == 0 if SAME else (apart <= 1).mean() >= 0.95
    names = sorted(path.name for path in then.glob("trace-*.parquet"))
    assert names == sorted(path.name for path in out.glob("trace-*.parquet"))
    assert_tables_equal(out, then, names)


def test_sample_takes_a_kept_sample_folder_for_finished(kept, capsys):
    before = {path: path.read_bytes() for path in (kept / "samples").rglob("*") if path.is_file()}
    for mitigation in chain.MITIGATIONS:
        chain.sample(kept / "model", kept / "index", mitigation, kept / "samples" / mitigation)
    after = {path: path.read_bytes() for path in (kept / "samples").rglob("*") if path.is_file()}
    assert after == before


def test_evaluate_finds_the_same_in_kept_folders(kept, tmp_path):
    chain.evaluate(kept, tmp_path / "evaluation")
    now, then = chain.metrics(tmp_path / "evaluation"), chain.metrics(kept / "evaluation")
    assert [(row["metric"], row["subject"]) for row in now] == [
        (row["metric"], row["subject"]) for row in then
    ]
    for found, expected in zip(now, then, strict=True):
        if expected["metric"].startswith("seconds") or "memory" in expected["metric"]:
            continue
        for name in ("value", "low", "high", "count"):
            value, known = found[name], expected[name]
            assert (value is None) == (known is None), (expected["metric"], name)
            if known is not None and not SAME:
                assert value == pytest.approx(known, rel=0.02, abs=0.02), expected["metric"]
            elif known is not None:
                assert value == known, (expected["metric"], expected["subject"], name)
    chain.run("report", evaluation=tmp_path / "evaluation")
    chain.run("report", evaluation=kept / "evaluation", out=tmp_path / "page")


def test_guidance_and_guard_have_the_bits_of_the_kept_traces():
    now, then = traces.traces(), np.load(traces.FILE)
    assert now.keys() == set(then.files)
    for name in then.files:
        # Steps of a guard build on each other, and multiply what rounding makes of them.
        assert_equal(now[name], then[name], tolerance=0.1 if name.startswith("guard/") else 1e-3)
