"""`memfree scratch`: a whole pipeline folder from captioned images, resumed and left alone."""

import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.scratch import scratch
from memfree.data import PartSizes

SMALL = [
    "--autoencoder.block_out_channels=[8,8]",
    "--autoencoder.batch_size=4",
    "--model.text_width=32",
    "--model.text_layers=1",
    "--model.block_out_channels=[16,16]",
    "--accelerator=cpu",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scratch")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:02}.png")
        (root / "images" / f"{number:02}.txt").write_text(f"noise number {number}")
    parts = PartSizes(train=6, calibration=2, test=2, fit=2)
    prepare(root / "data", source="folder", path=str(root / "images"), parts=parts, near_distance=0)
    return root / "data"


def test_it_is_built_once_and_resumed_by_the_same_command(data, tmp_path, capsys):
    def scratch(*options):
        entry.main(["scratch", f"--dataset={data}", f"--out={tmp_path / 'out'}", *SMALL, *options])
        return capsys.readouterr().out

    out = scratch("--autoencoder.steps=2")
    assert re.search(r"latents 4x8x8, \d+ tokens; reconstructions are off by", out)
    made = (tmp_path / "out" / "manifest.json").read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "diffusers")
    assert pipe.unet.config.cross_attention_dim == 32
    assert (tmp_path / "out" / "reconstructions.png").is_file()
    assert "already built as asked" in scratch("--autoencoder.steps=2")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == made
    with pytest.raises(SystemExit):  # other sizes of the U-Net make another model
        scratch("--autoencoder.steps=2", "--model.head_dim=16")
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == made
    (tmp_path / "out" / "manifest.json").unlink()  # as if killed before the end
    assert "resuming from" in scratch("--autoencoder.steps=2")


@pytest.mark.parametrize(
    ("captions", "fails", "error", "message"),
    [
        ([], None, ValueError, "all captions of its training images are empty"),
        (["a"], torch.OutOfMemoryError("CUDA out of memory"), RuntimeError, "out of memory"),
        (["a"], MemoryError("none left"), MemoryError, "none left"),
        (["a"], TypeError("hidden"), ValueError, "--model.* makes no text-to-image model: hidden"),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, monkeypatch, captions, fails, error, message):
    monkeypatch.setattr("memfree.commands.scratch._captions", lambda _: captions)
    if fails:
        build = Mock(side_effect=fails)
        monkeypatch.setattr("memfree.offline.stable_diffusion.build_pipeline", build)
    with pytest.raises(error, match=re.escape(message)):
        scratch(data, tmp_path / "out", accelerator="cpu")
    assert not (tmp_path / "out").exists()
