"""What would stop a command at its end is found out before its work."""

import json
import shutil

import pytest

from memfree.commands import scratch, train_clip, train_embedding, tune
from memfree.commands.audit import audit as audit_command
from memfree.commands.evaluate import evaluate as evaluate_command
from memfree.commands.index import index
from memfree.commands.prepare import prepare
from memfree.data import DuplicationPlan, PartSizes
from memfree.folders import atomic
from memfree.offline.stable_diffusion import AutoencoderOptions, ScratchOptions
from memfree.training.claim import Claim, begin

CLIP = ["red square", "blue circle", "green star"]


def captioned(folder, captions):
    """A dataset folder whose pictures have these captions in turn."""
    import numpy as np
    from PIL import Image

    source = folder / "source"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number:02d}.png")
        (source / f"{number:02d}.txt").write_text(captions[number % len(captions)])
    prepare(
        folder / "data",
        source="folder",
        path=str(source),
        parts=PartSizes(train=16, calibration=8, test=8, fit=8),
        plan=DuplicationPlan(images=0),
    )
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("data"), CLIP)


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("alike"), ["the same"])


@pytest.fixture
def no_work(monkeypatch):
    """Fail as soon as any command begins its long work."""

    def work(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("memfree.offline.small_clip.SmallClipModule.look_at", work)
    for name in (  # where commands import it from, once their options are right
        "memfree.offline.short_training.fit",
        "memfree.training.trainer.build_trainer",
        "memfree.models.load_model",
        "memfree.data.ingest.open_source",
        "memfree.retrieval.features.make.make_features",
        "memfree.retrieval.ReferenceIndex",
    ):
        monkeypatch.setattr(name, work)
    monkeypatch.setattr("memfree.evaluation.inputs.open_inputs", work)


COMMANDS = {
    "prepare": lambda data, out: prepare(out),
    "train-clip": lambda data, out: train_clip.train_clip(data, out),
    "train-embedding": lambda data, out: train_embedding.train_embedding(data, out),
    "index": lambda data, out: index(data, out),
    "tune": lambda data, out: tune.tune(data, data, out),
    "evaluate": lambda data, out: evaluate_command(data, data, {"a": data}, out),
    "audit": lambda data, out: audit_command(data, data, out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mount_point(data, tmp_path, monkeypatch, no_work, command):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(atomic, "_is_mounted", lambda folder: folder == out)
    with pytest.raises(ValueError, match="--out .* mount point"):
        COMMANDS[command](data, out)


def test_a_clip_without_test_images(data, tmp_path, no_work):
    folder = shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"]["test"] = {**manifest["parts"]["test"], "images": 0, "records": 0}
    manifest["shards"] = {
        name: value for name, value in manifest["shards"].items() if not name.startswith("test")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=str(folder)):
        train_clip.train_clip(folder, tmp_path / "out", batch_size=8)


def test_a_clip_whose_worth_cannot_be_measured(alike, tmp_path, no_work):
    with pytest.raises(ValueError, match="--dataset .* test"):
        train_clip.train_clip(alike, tmp_path / "out", batch_size=8)


@pytest.mark.parametrize("wrong", [{"norm_num_groups": 5}, {"text_width": 100, "head_dim": 32}])
def test_sizes_of_networks_that_are_built_last(data, tmp_path, no_work, wrong):
    small = {"text_width": 32, "text_layers": 1, "block_out_channels": [16, 32]}
    options = ScratchOptions(**{**small, "norm_num_groups": 8, **wrong})
    sizes = AutoencoderOptions(block_out_channels=[8, 16], norm_num_groups=8)
    with pytest.raises(ValueError, match="--model"):
        scratch.scratch(data, tmp_path / "out", options, sizes)


def test_nothing_of_an_overwritten_model_is_left(tmp_path):
    """Adapters, exposures and pictures belong to the weights that they were made with."""
    for name in (
        "lora/pytorch_lora_weights.safetensors",
        "diffusers/unet/config.json",
        "checkpoints/step-00000001.ckpt",
        "logs/version_0/metrics.csv",
        "samples/samples-0000001.png",
        "exposures.parquet",
        "reconstructions.png",
        "config.yaml",
        "manifest.json",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    begin(tmp_path, Claim("other"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
