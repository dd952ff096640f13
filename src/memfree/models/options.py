"""Options of models and their training (no torch here, so that ``--help`` is quick)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True)
class NetworkOptions:
    """Size and shape of the U-Net (diffusers UNet2DModel)."""

    block_out_channels: list[PositiveInt] = field(default_factory=lambda: [32, 64, 64])
    """Channels of each resolution, finest first; every further one halves the image."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True])
    """Whether each resolution has self-attention, finest first."""
    layers_per_block: PositiveInt = 1
    """Residual blocks of a resolution on the way down (one more on the way up)."""
    norm_num_groups: PositiveInt = 8
    """Groups of the group normalisation; divides every entry of block_out_channels."""
    attention_head_dim: PositiveInt = 8
    """Channels of one attention head."""
    time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How time and class enter a residual block: added, or as a scale and a shift."""
    dropout: NonNegativeFloat = 0.0
    """Dropout probability in the residual blocks, below 1."""


@dataclass(frozen=True)
class NoiseOptions:
    """The noise schedule and what the network predicts."""

    scheduler: str = "DDPMScheduler"
    """diffusers scheduler saved with the model; training uses its noise levels."""
    num_train_timesteps: PositiveInt = 1000
    """Number of noise levels."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    """How the noise grows; squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal."""
    beta_start: PositiveFloat = 1e-4
    """First beta (not used by squaredcos_cap_v2)."""
    beta_end: PositiveFloat = 0.02
    """Last beta (not used by squaredcos_cap_v2)."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Whether the network predicts the noise or the velocity v."""
    clip_sample: bool = True
    """Whether samplers built from the saved scheduler clip the clean estimate to [-1, 1]."""


@dataclass(frozen=True)
class FineTuneOptions:
    """How a pretrained text-to-image pipeline is fine-tuned."""

    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters in the U-Net's attention, which alone are trained (Hu et al.,
    2022); 0 trains the whole U-Net."""
    lora_alpha: NonNegativeFloat = 0.0
    """Scale of the adapters is lora_alpha / lora_rank; 0: lora_alpha equals the rank."""
    train_text_encoder: bool = False
    """Whether the text encoder is trained with the U-Net."""
    min_snr_gamma: NonNegativeFloat = 0.0
    """Cap of the signal-to-noise ratio in the loss weight (Hang et al., 2023, use 5); 0: all noise
    levels weigh the same."""
    gradient_checkpointing: bool = False
    """Whether U-Net activations are recomputed rather than kept: less memory, more time."""
    cache: bool = False
    """Whether latents and, if the text encoder is frozen, text embeddings are kept in memory."""


@dataclass(frozen=True)
class ModelOptions:
    """The model and how its weights are found."""

    network: NetworkOptions = field(default_factory=NetworkOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    pretrained: str | None = None
    """Stable-Diffusion-style pipeline to fine-tune with captions: a diffusers folder, a model
    folder, or a name on the hub (SD 1.x, 2.x, SDXL). It brings its own network and noise schedule,
    replacing the two options above. Without it a pixel model is trained from scratch."""
    finetune: FineTuneOptions = field(default_factory=FineTuneOptions)
    class_conditional: bool = False
    """Whether a pixel model is conditioned on labels; needs a labelled dataset folder."""
    label_dropout: ClosedUnitInterval = 0.1
    """Share of training labels or captions replaced by "no class" or the empty caption, for
    classifier-free guidance."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate of AdamW, reached after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps over which the learning rate rises linearly."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine down to 0 at the last step, or constant."""
    ema_decay: ClosedUnitInterval = 0.995
    """Decay per step, below 1, of the averaged weights, which are the ones saved; 0: no average."""
    compile: bool = False
    """Whether torch.compile compiles the network."""

    @classmethod
    def of(cls, given: ModelOptions | Mapping[str, Any]) -> ModelOptions:
        """Return options as they are, or build them from a ``dataclasses.asdict`` mapping."""
        if isinstance(given, ModelOptions):
            return given
        parts = {"network": NetworkOptions, "noise": NoiseOptions, "finetune": FineTuneOptions}
        try:
            made = {name: kind(**given[name]) for name, kind in parts.items() if name in given}
            return cls(**{**given, **made})
        except TypeError as error:
            raise ValueError(f"these are not options of a model: {error}") from error


@dataclass(frozen=True)
class AutoencoderOptions:
    """Shape and training of the autoencoder (diffusers AutoencoderKL)."""

    block_out_channels: list[PositiveInt] = field(default_factory=lambda: [16, 32, 64])
    """Channels of each resolution, finest first; every further one halves the image: three turn
    32x32 images into 8x8 latents."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    norm_num_groups: PositiveInt = 8
    """Groups of the group normalisation; divides every entry of block_out_channels."""
    steps: PositiveInt = 3000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Images per step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest learning rate of AdamW: a linear rise over a tenth of the steps, then a cosine."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the Kullback-Leibler term, which keeps latents near a standard normal."""
    shift: int = 3
    """Images are shifted by up to this many pixels and mirrored, so that few images suffice."""


@dataclass(frozen=True)
class ScratchOptions:
    """Sizes of the small text-to-image model."""

    vocabulary: PositiveInt = 2000
    """Maximum number of tokens in the byte-pair vocabulary."""
    tokens: PositiveInt = 24
    """Length of an encoded prompt; longer ones are cut."""
    text_width: PositiveInt = 128
    """Channels of the text encoder."""
    text_layers: PositiveInt = 2
    """Layers of the text encoder."""
    block_out_channels: list[PositiveInt] = field(default_factory=lambda: [32, 64, 96])
    """Channels of each resolution of the U-Net, finest first."""
    layers_per_block: PositiveInt = 1
    """Residual blocks of a resolution on the way down (one more on the way up)."""
    norm_num_groups: PositiveInt = 16
    """Groups of the group normalisation; divides every entry of block_out_channels."""
    head_dim: PositiveInt = 32
    """Channels of one attention head."""


@dataclass(frozen=True)
class AugmentationOptions:
    """Which changes of an image still count as a copy of it, and how strong they are."""

    smallest_crop: ClosedUnitInterval = 0.4
    """Smallest share of the area that a crop keeps, above 0."""
    shift: ClosedUnitInterval = 0.1
    """Largest shift as a share of the side; uncovered pixels repeat the border."""
    rotation: NonNegativeFloat = 10.0
    """Largest rotation, in degrees."""
    flip: ClosedUnitInterval = 0.5
    """Probability of a mirror image."""
    colour: ClosedUnitInterval = 0.4
    """Largest relative change of brightness, contrast and saturation."""
    gray: ClosedUnitInterval = 0.1
    """Probability of a gray image."""
    blur: NonNegativeFloat = 0.06
    """Largest standard deviation of a Gaussian blur as a share of the side; half the images are
    blurred, as a diffusion model's predictions at high noise are."""
    noise: NonNegativeFloat = 0.4
    """Largest standard deviation of added noise, for pixels in -1 to 1; half the images get it."""
    jpeg: ClosedUnitInterval = 0.25
    """Probability of JPEG compression at quality 20 to 90."""


@dataclass(frozen=True)
class CopyDetectionOptions:
    """How the embedding is trained."""

    temperature: PositiveFloat = 0.1
    """Temperature of InfoNCE; SSCD's 0.05 is for batches of thousands."""
    entropy_weight: NonNegativeFloat = 3.0
    """Weight λ of the differential entropy; SSCD's 30 is for batches of thousands."""
    learning_rate: PositiveFloat = 2e-3
    """Highest learning rate of AdamW; it falls to 0 along a cosine."""
    weight_decay: NonNegativeFloat = 1e-3
    """Weight decay of AdamW."""
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)


_MILD = AugmentationOptions(
    smallest_crop=0.7, shift=0.05, colour=0.1, gray=0.0, blur=0.04, noise=0.2, jpeg=0.1
)


@dataclass(frozen=True)
class SmallClipOptions:
    """The model and how it is trained."""

    embedding: PositiveInt = 128
    """Length of the common embedding of images and texts."""
    text_width: PositiveInt = 128
    """Width of the text transformer, a multiple of 32."""
    text_layers: PositiveInt = 2
    """Layers of the text transformer."""
    context_length: PositiveInt = 24
    """Tokens read of a caption, start and end included."""
    temperature: PositiveFloat = 0.1
    """Initial temperature of the contrastive loss; it is learned."""
    word_dropout: ClosedUnitInterval = 0.3
    """Probability that a caption's word is left out; at least one stays."""
    image_dropout: ClosedUnitInterval = 0.3
    """Dropout of the trunk's features."""
    views: PositiveInt = 8
    """Augmented views of each image that the trunk sees once, before training; the first is the
    image itself."""
    learning_rate: PositiveFloat = 1e-3
    """Highest learning rate of AdamW; it falls to 0 along a cosine."""
    weight_decay: NonNegativeFloat = 0.2
    """Weight decay of AdamW."""
    augmentation: AugmentationOptions = field(default_factory=lambda: _MILD)


LoggerName = Literal["csv", "tensorboard", "wandb", "none"]


@dataclass(frozen=True)
class Devices:
    """Where a command runs: the Lightning Trainer's options, also part of ``TrainerOptions``."""

    accelerator: str = "auto"
    """auto, cpu, gpu, mps or another name that Lightning knows."""
    devices: int | str = "auto"
    """How many devices, or auto."""
    num_nodes: PositiveInt = 1
    """How many machines."""
    strategy: str = "auto"
    """How several devices work together: auto, ddp, ..."""


Accelerator = Literal["auto", "cpu", "gpu", "mps"]
"""For short trainings, which run on one device."""
