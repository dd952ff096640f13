"""A tiny untrained model with an index, and sample.py on it."""

import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from processes import start

from memfree.guidance import NormalizedL2, calibrate
from memfree.models import export_model
from memfree.retrieval import ReferenceIndex

SCRIPT = Path(__file__).parents[2] / "sample.py"
SHAPE = (1, 8, 8)
DATASET = "d" * 64


def make_folders(root):
    """A class-conditional model, an unconditional one, and an index with a calibration."""
    torch.manual_seed(0)
    for name, num_classes in (("model", 3), ("unconditional", None)):
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        fields = {"num_classes": num_classes, "image_shape": SHAPE, "dataset_hash": DATASET}
        export_model(root / name, DDPMPipeline(network, DDPMScheduler()), seed=0, **fields)
    images = torch.rand(64, *SHAPE) * 2 - 1
    index = ReferenceIndex.build(images, labels=torch.arange(64) % 3)
    index.dataset_hash = DATASET
    index.save(root / "uncalibrated")
    calibrate(index, NormalizedL2(), torch.rand(500, *SHAPE) * 2 - 1)
    index.save(root / "index")
    index.dataset_hash = "e" * 64
    index.save(root / "other_index")
    small = ReferenceIndex.build(torch.rand(64, 1, 4, 4) * 2 - 1)
    small.save(root / "small_index")
    return root


def options(folders, out, **changes):
    values = {
        "model": folders / "model",
        "index": folders / "index",
        "out": out,
        "count": 7,
        "batch_size": 3,
        "steps": 4,
        "scheduler": "ddim",
        "guidance_scale": 2,
        "trainer.accelerator": "cpu",
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def begin(arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
