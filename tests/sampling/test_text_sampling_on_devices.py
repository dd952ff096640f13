"""Text-to-image through the Lightning trainer: what AMG promises, in every precision."""

import pytest
import torch
from compute_devices import lightning_name, on_gpu
from diffusers import DDIMScheduler
from lightning.pytorch import Trainer
from tiny_text import CAPTIONS, tiny_pipeline, tiny_xl
from torch.utils.data import DataLoader

from memfree.guidance import GuidanceSettings, NormalizedL2, calibrate
from memfree.models import load_model
from memfree.retrieval import ReferenceIndex
from memfree.sampling import SamplingModule

COUNT, BATCH, STEPS = 6, 4, 4
KEY = "nl2-k50-a0.5"


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_xl])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipe")
    request.param().save_pretrained(path)
    return path


def random_images(count, seed):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predicted(folder, index, settings, device, precision):
    """Images and trace of ``COUNT`` samples, drawn as sample.py draws them."""
    model = load_model(folder)
    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    module = SamplingModule(model, scheduler, STEPS, 5, settings, 3.0, CAPTIONS, index)
    trainer = Trainer(
        accelerator=lightning_name(device),
        devices=1,
        precision=precision,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(dataset=torch.arange(COUNT), batch_size=BATCH)
    batches = trainer.predict(module, dataloaders=loader)
    index.to("cpu")
    return torch.cat([one.images for one in batches]), torch.cat(
        [one.trace["active"] for one in batches]
    )


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "32-true"),
        ("cpu", "bf16-mixed"),
        on_gpu("cuda", "32-true"),
        on_gpu("cuda", "bf16-mixed"),
        on_gpu("cuda", "16-mixed"),
    ],
)
def test_samples_are_near_those_of_the_cpu_and_guided_ones_are_no_copies(folder, device, precision):
    index = ReferenceIndex.build(random_images(60, 1), groups=range(60))
    calibrate(index, NormalizedL2(), random_images(500, 2))
    reference, _ = predicted(folder, index, GuidanceSettings(), "cpu", "32-true")
    plain, _ = predicted(folder, index, GuidanceSettings(), device, precision)
    assert plain.device.type == "cpu" and plain.dtype == torch.float32
    error = float((plain - reference).norm() / reference.norm())
    assert error < (1e-2 if precision == "32-true" else 0.15)

    held = ReferenceIndex.build(
        torch.cat([plain.clamp(-1, 1), random_images(60, 1)]), groups=range(COUNT + 60)
    )
    calibrate(held, NormalizedL2(), random_images(500, 2))
    held.calibrations[KEY]["sigmas"] = [-0.2] * 500
    settings = GuidanceSettings("amg", c2=0.0, gate_margin=0.04)
    guided, active = predicted(folder, held, settings, device, precision)
    sigma = NormalizedL2()(held, guided.clamp(-1, 1)).sigma
    assert bool(active.any()) and bool((sigma <= -0.2).all())
    assert bool((NormalizedL2()(held, plain.clamp(-1, 1)).sigma > -0.2).all())
