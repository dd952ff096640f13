"""The text-to-image model of ``memfree scratch`` with random weights, and an index for it.

Time does not depend on weights; which samples come near a reference does, so benchmarks force it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from detection import pictures
from diffusers import AutoencoderTiny, DDIMScheduler
from torch import nn

from memfree.guidance import calibrate, default_similarity
from memfree.models import LoadedModel
from memfree.models.autoencoder import AutoencoderModule
from memfree.models.options import AutoencoderOptions, ScratchOptions
from memfree.models.small_pipeline import build_pipeline
from memfree.models.text_pipeline import TextDenoiser, encode
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.copy_detection import (
    CopyDetectionFeatures,
    CopyDetectionNetwork,
    CopyDetectionShape,
)
from memfree.retrieval.latents import LatentFeatures

IMAGE, REFERENCES, BATCH, STEPS, SCALE = (3, 32, 32), 500, 8, 25, 3.0
"""(C, H, W); references; samples drawn together; steps of DDIM; classifier-free guidance."""
PROMPTS = [f"a red bird number {i}" for i in range(BATCH)]
"""One a sample."""
CAPTIONS = [f"picture {i} of the training set" for i in range(REFERENCES)]
"""Of the references: none is a prompt, so that eq. 16 always costs a call of the denoiser."""


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> Callable[[], float]:
    """Wall time on a GPU; on the CPU processor time of one thread, which no other job distorts."""
    if device().type == "cuda":
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def scratch_model(small_decoder: bool = False) -> LoadedModel:
    """The model at the sizes of ``memfree scratch``'s defaults, its latents of unit variance.

    Args:
        small_decoder: decode clean estimates with an ``AutoencoderTiny`` of 16 channels and one
            block a resolution.
    """
    images = pictures(64, torch.Generator().manual_seed(1))
    vae = AutoencoderModule(AutoencoderOptions(), images).finish()
    pipe: Any = build_pipeline(vae, [*PROMPTS, *CAPTIONS], ScratchOptions(), seed=0)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    with torch.no_grad():
        null = encode(pipe, [""])
    model = LoadedModel(
        denoiser=TextDenoiser(pipe.unet, IMAGE[1:], null),
        scheduler=pipe.scheduler,
        image_shape=IMAGE,
        num_classes=None,
        manifest={},
        pipe=pipe,
        decoder=_small_decoder() if small_decoder else None,
    )
    model.to(device())
    return model


def _small_decoder() -> Any:
    torch.manual_seed(0)
    decoder: Any = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=AutoencoderOptions().latent_channels,
    )
    return decoder.eval().requires_grad_(False)


def sampler(model: LoadedModel) -> Any:
    """DDIM on the model's own noise levels."""
    return DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)


def scratch_index(captions: list[str] = CAPTIONS) -> ReferenceIndex:
    """Calibrated references under a copy-detection network at 32 pixels, of random weights."""
    torch.manual_seed(0)
    shape = CopyDetectionShape()
    features = CopyDetectionFeatures(shape, CopyDetectionNetwork(shape).state_dict())
    index = ReferenceIndex.build(
        _references(), features, captions=captions, groups=range(REFERENCES), counts=_counts()
    )
    calibrate(index, default_similarity(index), pictures(500, torch.Generator().manual_seed(2)))
    return index.to(device())


def scratch_latents(model: LoadedModel) -> ReferenceIndex:
    """The same references as latents, for multiplicity guidance."""
    features = LatentFeatures(model.pipe.vae)
    index = ReferenceIndex.build(
        _references().to(device()),
        features,
        captions=CAPTIONS,
        groups=range(REFERENCES),
        counts=_counts(),
    )
    model.to(device())  # the index has put the autoencoder where it was embedded
    return index.to(device())


def _references() -> torch.Tensor:
    return pictures(REFERENCES, torch.Generator().manual_seed(0))


def _counts() -> torch.Tensor:
    counts = torch.ones(REFERENCES, dtype=torch.int64)
    counts[::50] = 100
    return counts
