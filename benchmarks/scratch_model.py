"""The text-to-image model of ``memfree scratch`` with random weights, and an index for it.

Time does not depend on weights; which samples come near a reference does, so benchmarks force it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from detection import pictures
from diffusers import AutoencoderTiny, DDIMScheduler
from torch import nn

from memfree.guidance import calibrate, default_similarity
from memfree.models import LoadedModel
from memfree.models.options import AutoencoderOptions, ScratchOptions
from memfree.models.text_pipeline import TextDenoiser, encode
from memfree.offline.stable_diffusion import AutoencoderModule, build_pipeline
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.copy_detection import (
    CopyDetectionFeatures,
    CopyDetectionNetwork,
    CopyDetectionShape,
)
from memfree.retrieval.features.latents import LatentFeatures

IMAGE, SCALE = (3, 32, 32), 3.0
"""(C, H, W); classifier-free guidance."""


@dataclass(frozen=True)
class Size:
    """How much is measured; the defaults are those of ``memfree scratch``."""

    references: int = 500
    batch: int = 8
    """Samples drawn together."""
    steps: int = 25
    """Of DDIM."""
    calibration: int = 500
    """Images that the index is calibrated on."""
    repetitions: int = 4
    network: ScratchOptions = field(default_factory=ScratchOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    features: CopyDetectionShape = field(default_factory=CopyDetectionShape)

    @property
    def prompts(self) -> list[str]:
        """One a sample."""
        return [f"a red bird number {i}" for i in range(self.batch)]

    @property
    def captions(self) -> list[str]:
        """Of the references: none is a prompt, so eq. 16 always costs a call of the denoiser."""
        return [f"picture {i} of the training set" for i in range(self.references)]


FULL = Size()
TINY = Size(
    references=60,
    batch=2,
    steps=2,
    repetitions=2,
    network=ScratchOptions(
        vocabulary=600,
        text_width=16,
        text_layers=1,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        head_dim=8,
    ),
    autoencoder=AutoencoderOptions(block_out_channels=[4, 4, 4], norm_num_groups=4),
    features=CopyDetectionShape(widths=(8, 8), dimension=8),
)


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> Callable[[], float]:
    """Wall time on a GPU; on the CPU processor time of one thread, which no other job distorts."""
    if device().type == "cuda":
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def scratch_model(size: Size, small_decoder: bool = False) -> LoadedModel:
    """The model, its latents of unit variance.

    Args:
        size: its sizes.
        small_decoder: decode clean estimates with an ``AutoencoderTiny`` of 16 channels and one
            block a resolution.
    """
    images = pictures(64, torch.Generator().manual_seed(1))
    vae = AutoencoderModule(size.autoencoder, images).finish()
    pipe: Any = build_pipeline(vae, [*size.prompts, *size.captions], size.network, seed=0)
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


def scratch_index(size: Size, captions: list[str] | None = None) -> ReferenceIndex:
    """Calibrated references under a copy-detection network at 32 pixels, of random weights."""
    torch.manual_seed(0)
    features = CopyDetectionFeatures(
        size.features, CopyDetectionNetwork(size.features).state_dict()
    )
    index = ReferenceIndex.build(
        _references(size),
        features,
        captions=captions or size.captions,
        groups=range(size.references),
        counts=_counts(size),
    )
    held_out = pictures(size.calibration, torch.Generator().manual_seed(2))
    calibrate(index, default_similarity(index), held_out)
    return index.to(device())


def scratch_latents(size: Size, model: LoadedModel) -> ReferenceIndex:
    """The same references as latents, for multiplicity guidance."""
    features = LatentFeatures(model.pipe.vae)
    index = ReferenceIndex.build(
        _references(size).to(device()),
        features,
        captions=size.captions,
        groups=range(size.references),
        counts=_counts(size),
    )
    model.to(device())  # the index has put the autoencoder where it was embedded
    return index.to(device())


def _references(size: Size) -> torch.Tensor:
    return pictures(size.references, torch.Generator().manual_seed(0))


def _counts(size: Size) -> torch.Tensor:
    counts = torch.ones(size.references, dtype=torch.int64)
    counts[::50] = 100
    return counts
