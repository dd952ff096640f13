"""What a model is and how its weights are found, as options of train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)

from memfree.models.network import NetworkOptions
from memfree.models.noise_schedule import NoiseOptions


@dataclass(frozen=True)
class FineTuneOptions:
    """How a pretrained text-to-image pipeline is fine-tuned."""

    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters in the U-Net's attention, which alone are trained (Hu et al.,
    2022); 0: the whole U-Net is trained."""
    lora_alpha: NonNegativeFloat = 0.0
    """Adapters count lora_alpha / lora_rank; 0: as much as the rank."""
    train_text_encoder: bool = False
    """Whether the text encoder is trained with the U-Net."""
    min_snr_gamma: NonNegativeFloat = 0.0
    """Cap of the signal-to-noise ratio in the weight of the loss (Hang et al., 2023; 5 there); 0:
    all noise levels weigh the same."""
    gradient_checkpointing: bool = False
    """Whether activations of the U-Net are computed again instead of kept: less memory,
    more time."""
    cache: bool = False
    """Whether latents and, if the text encoder is frozen, text embeddings are kept in memory."""


@dataclass(frozen=True)
class ModelOptions:
    """The model and how its weights are found."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    pretrained: str | None = None
    """Stable-Diffusion-style pipeline to fine-tune with captions: a diffusers folder, a model
    folder, or a name on the hub (SD 1.x, 2.x, SDXL). Its own network and noise schedule then count,
    not the two options above. Without it a pixel model is trained from nothing."""
    finetune: FineTuneOptions = field(default_factory=FineTuneOptions)
    class_conditional: bool = False
    """Whether a pixel model is told the label; needs a labelled dataset folder."""
    label_dropout: ClosedUnitInterval = 0.1
    """Share of training labels replaced by "no class", or of captions by the empty one, for
    classifier-free guidance."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate of AdamW, reached after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps over which the learning rate rises linearly."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to 0 at the last step along a cosine, or constant."""
    ema_decay: ClosedUnitInterval = 0.995
    """Decay a step, below 1, of the average of the weights, which is what is saved; 0: none."""
    compile: bool = False
    """Whether torch.compile compiles the network."""
