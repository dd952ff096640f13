"""Fine-tuning in mixed precision, compiled, and on two devices."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from compute_devices import lightning_name, on_gpu
from PIL import Image
from tiny_text import CAPTIONS, tiny_pipeline
from torch.utils.data import DataLoader

from memfree.commands.prepare import prepare
from memfree.data import PartSizes
from memfree.models import FineTuneOptions, ModelOptions, export_model, load_model
from memfree.models.text_pipeline import encode
from memfree.models.text_to_image import TextToImageModule

SCRIPT = Path(__file__).parents[2] / "train.py"
SHAPE = (3, 8, 8)
STEPS = 3


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def batches():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, *SHAPE, generator=generator) * 2 - 1
    one = {"image": images, "caption": CAPTIONS, "row": torch.arange(4)}
    return DataLoader(dataset=[one] * STEPS, batch_size=None)


def trained(make_trainer, device, precision, compiled=False, **finetune):
    """A module after ``STEPS`` steps on one batch, and the losses."""
    options = ModelOptions(
        finetune=FineTuneOptions(**finetune),
        label_dropout=0.0,
        compile=compiled,
        learning_rate=1e-2,
        warmup_steps=1,
    )
    losses, module = Losses(), TextToImageModule(options, tiny_pipeline(), SHAPE)
    trainer = make_trainer(
        [losses],
        accelerator=lightning_name(device),
        precision=precision,
        max_steps=STEPS,
        enable_checkpointing=False,
    )
    trainer.fit(module, train_dataloaders=batches())
    return module, losses.values


@pytest.mark.parametrize(
    ("device", "precision", "compiled"),
    [
        ("cpu", "bf16-mixed", False),
        on_gpu("cuda", "32-true", False),
        on_gpu("cuda", "bf16-mixed", False),
        on_gpu("cuda", "bf16-mixed", True),
        on_gpu("cuda", "16-mixed", False),
    ],
)
@pytest.mark.parametrize(
    "finetune",
    [
        {"gradient_checkpointing": True},
        {"lora_rank": 2, "cache": True},
        {"train_text_encoder": True, "min_snr_gamma": 5.0},
    ],
)
def test_mixed_precision_follows_full_precision(
    make_trainer, tmp_path, device, precision, compiled, finetune
):
    torch._dynamo.reset()
    module, losses = trained(make_trainer, device, precision, compiled, **finetune)
    if device == "cpu":  # a GPU draws other noise from the same seed
        _, expected = trained(make_trainer, "cpu", "32-true", **finetune)
        assert losses == pytest.approx(expected, rel=0.03)
    assert len(losses) == STEPS and all(0 < loss < 10 for loss in losses)
    before = dict(TextToImageModule(module.options, tiny_pipeline(), SHAPE).named_parameters())
    moved = {}
    for name, weight in module.named_parameters():
        assert weight.dtype == torch.float32 and bool(weight.isfinite().all())
        name = name.replace("_orig_mod.", "")
        moved[name] = not torch.equal(weight.detach().cpu(), before[name].detach())
    assert any(moved.values())
    if "lora_rank" in finetune:
        assert {name for name in moved if moved[name]} <= {n for n in moved if "lora" in n}
    # What is saved is the trained network, in full precision and under its own names.
    export_model(tmp_path / "m", module.pipeline(), 0, image_shape=list(SHAPE), **module.facts())
    loaded, x = load_model(tmp_path / "m"), torch.randn(2, 4, 4, 4)
    module.to("cpu").eval()
    conditions = loaded.encode(CAPTIONS[:2])
    if not compiled:
        with torch.no_grad():
            ours = module.denoiser(x, torch.tensor(9), encode(module.pipeline(), CAPTIONS[:2]))
            theirs = loaded.denoiser(x, torch.tensor(9), conditions)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """24 captioned training images of 8x8 pixels, and the pipeline to fine-tune."""
    root = tmp_path_factory.mktemp("captioned")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(40):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:02}.png")
        (root / "images" / f"{number:02}.txt").write_text(CAPTIONS[number % 4])
    parts = PartSizes(train=24, calibration=6, test=5, fit=5)
    prepare(root / "data", source="folder", path=str(root / "images"), parts=parts)
    tiny_pipeline().save_pretrained(root / "pipeline")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "32-true"), on_gpu("cuda", "bf16-mixed", count=2)]
)
def test_two_devices_train_one_pipeline(captioned, tmp_path, device, precision):
    options = {
        "data.path": captioned / "data",
        "data.batch_size": 4,
        "data.num_workers": 0,
        "model.pretrained": captioned / "pipeline",
        "out": tmp_path / "m",
        "trainer.max_steps": 3,
        "trainer.accelerator": lightning_name(device),
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "trainer.precision": precision,
        "trainer.sample_grid_every_n_steps": 0,
        "trainer.enable_progress_bar": "false",
    }
    command = [sys.executable, str(SCRIPT), *(f"--{name}={one}" for name, one in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["devices"] == 2 and manifest["steps"] == 3
    # Three steps of two batches of 4: every image once.
    assert manifest["exposures"] == {"total": 24, "images_seen": 24, "largest": 1}
    assert load_model(tmp_path / "m").pipe is not None
