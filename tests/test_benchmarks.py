"""Every benchmark runs, at its smallest sizes, and leaves the published records alone."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    """As for ``python benchmarks/NAME.py``; their plain names are forgotten again."""
    before = {*sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_in_its_tiny_form(name, tmp_path, monkeypatch, capfd):
    measure = importlib.import_module("harness").measure
    published = {path: path.read_bytes() for path in BENCHMARKS.glob("results/*")}
    monkeypatch.chdir(tmp_path)
    run = importlib.import_module(name).run
    records = measure(name, run, ["--tiny"], tmp_path / "results")
    assert records and list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in BENCHMARKS.glob("results/*")} == published
    for record in records:
        assert record["ours"] > 0 and record["peer"] > 0 and record["ratio"] > 0
    assert len({record["name"] for record in records}) == len(records)
    assert records[0]["unit"] in capfd.readouterr().out


def test_the_records_of_full_sizes_are_written(tmp_path):
    harness = importlib.import_module("harness")
    told = []

    def run(tiny):
        told.append(tiny)
        return [harness.record("ours / theirs", 1.0, 2.0, "s")]

    harness.measure("name", run, [], tmp_path)
    assert told == [False]
    (record,) = json.loads((tmp_path / "name.json").read_text())
    assert record["ratio"] == 0.5
    with pytest.raises(SystemExit):
        harness.measure("name", run, ["--tinny"], tmp_path)


def test_make_bench_runs_all_but_what_needs_a_study():
    line = re.search(r"for name in (.*); do .*benchmarks", (ROOT / "Makefile").read_text())
    assert {*line[1].split()} == {*NAMES} - {"mitigations"}


def test_reconstructions_are_measured(tmp_path, monkeypatch):
    """The measurement of an autoencoder's influence on thresholds, on a tiny one."""
    import torch
    from diffusers import AutoencoderKL

    monkeypatch.syspath_prepend(str(BENCHMARKS / "measurements"))
    measured = importlib.import_module("decoded_calibration")
    AutoencoderKL(
        block_out_channels=(4,), latent_channels=2, norm_num_groups=2, sample_size=8
    ).save_pretrained(tmp_path / "vae")
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    decoded = measured.reconstructed(tmp_path, images, batch_size=2)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    whole = measured.reconstructed(tmp_path, images)
    assert torch.allclose(decoded, whole, atol=1e-6) and not torch.equal(decoded, images)
