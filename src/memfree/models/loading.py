"""Loading a trained model as a denoiser: diffusers folders and small decoders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers import AutoencoderTiny, UNet2DModel
from torch import Tensor, nn

from memfree.conditions import TextConditions
from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import short
from memfree.folders.untrusted_models import check_network, check_scheduler, read_config
from memfree.models.ddpm import scheduler_class_named
from memfree.models.export import DIFFUSERS_NAME
from memfree.models.text_pipeline import TextDenoiser, encode, load_pipeline
from memfree.retrieval.features.latents import scaling


def latent_shape(vae: Any, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent shape (C, h, w) of images (3, H, W); ValueError if they do not fit."""
    channels, height, width = image_shape
    factor = pixels_per_latent(vae)
    if channels != vae.config.in_channels:
        raise ValueError(
            f"the pipeline's autoencoder takes {vae.config.in_channels} channels, the images have "
            f"{channels}: prepare them with --channels {vae.config.in_channels}"
        )
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be encoded: prepare them with an "
            f"--image_size that {factor} divides"
        )
    return vae.config.latent_channels, height // factor, width // factor


def pixels_per_latent(autoencoder: Any) -> int:
    """Image pixels per latent along height and width."""
    config = autoencoder.config
    # An AutoencoderTiny's block_out_channels are the decoder's.
    return getattr(config, "upsampling_scaling_factor", 2) ** (len(config.block_out_channels) - 1)


@torch.no_grad()
def posterior(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (z − shift)·scaling_factor, for images (B, 3, H, W)."""
    distribution = vae.encode(images.to(vae.dtype)).latent_dist
    scale, shift = scaling(vae)
    return (distribution.mean.float() - shift) * scale, distribution.std.float() * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode scaled latents to images (B, 3, H, W), about in [−1, 1]; differentiable. Keeps the
    weights' dtype under autocast: SDXL's VAE overflows in float16, and bfloat16 loses shades."""
    scale, shift = scaling(vae)
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0].float()


def load_network(kind: Any, folder: Path) -> Any:
    """Load a diffusers network in float32 on the CPU; ValueError if it does not load."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no network: train the model again or copy it whole")
    with _silent():
        check_network(kind, folder)
    try:
        with _silent():
            # Safetensors only: a pickle from a stranger could execute code.
            network, keys = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                # The default needs accelerate, and warns at every load without it.
                low_cpu_mem_usage=False,
                # By default random weights replace those that do not fit.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read as a diffusers network: {short(error, 120)}"
        ) from error
    mismatched = [name for name, *_ in keys["mismatched_keys"]]
    if wrong := [*keys["missing_keys"], *keys["unexpected_keys"], *mismatched]:
        raise ValueError(
            f"{folder}: the weights are of another network than config.json ({wrong[0]} does not "
            "fit): copy the model folder whole"
        )
    return network


@contextmanager
def _silent() -> Iterator[None]:
    names = ("models.modeling_utils", "configuration_utils")
    logs = [logging.getLogger(f"diffusers.{name}") for name in names]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log in logs:
            log.disabled = False


def load_decoder(folder: Path, vae: Any) -> Any:
    """Load ``--decoder``, a frozen AutoencoderTiny such as TAESD, for the latents of ``vae``."""
    name = f"--decoder {folder}"
    config = folder / "config.json"
    if not config.is_file() or read_config(config).get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"{name} is not a folder of a diffusers AutoencoderTiny")
    decoder = load_network(AutoencoderTiny, folder).eval().requires_grad_(False)
    check_decoder(decoder, vae, name)
    return decoder


def check_decoder(decoder: Any, vae: Any, name: str) -> None:
    """Refuse a decoder that does not map latents of ``vae`` to images of the same size."""
    if not hasattr(decoder, "decode") or not hasattr(decoder, "config"):
        raise ValueError(f"{name} is a {type(decoder).__name__}, not an autoencoder")
    own, wanted = (
        f"takes latents of {part.config.latent_channels} channels and makes "
        f"{pixels_per_latent(part)}x{pixels_per_latent(part)} pixels of "
        f"{part.config.out_channels} channels of each"
        for part in (decoder, vae)
    )
    if own != wanted:
        raise ValueError(
            f"{name} {own}, the pipeline's autoencoder {wanted}: use a decoder of the pipeline's "
            "own latents"
        )


MAX_SIDE = 1 << 14
"""Largest plausible height or width of a model's images, pixels."""


class Denoiser(nn.Module):
    """A U-Net with one calling convention for unconditional and class-conditional models."""

    def __init__(self, network: Any, num_classes: int | None = None) -> None:
        """Wrap a UNet2DModel with ``num_classes + 1`` embeddings, or an unconditional one."""
        super().__init__()
        self.network = network
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor | int, conditions: Tensor | None = None) -> Tensor:
        """Predict (B, C, H, W) at timesteps t, 0-d or (B,); label ``num_classes`` is "no class"."""
        if self.num_classes is None and conditions is not None:
            raise ValueError("conditions were given, but the model is unconditional")
        if conditions is None:
            conditions = self.unconditional(len(x_t), x_t.device)
        return self.network(x_t, t, class_labels=conditions, return_dict=False)[0]

    def unconditional(self, count: int, device: torch.device) -> Tensor | None:
        """The "no class" label, (count,) int64; None for an unconditional model."""
        if self.num_classes is None:
            return None
        return torch.full((count,), self.num_classes, device=device)


@dataclass
class LoadedModel:
    """A model folder, loaded."""

    denoiser: nn.Module
    """Called as ``denoiser(x_t, t, conditions)``; frozen, on the CPU."""
    scheduler: Any
    image_shape: tuple[int, int, int]
    num_classes: int | None
    manifest: dict[str, Any]
    """The folder's ``manifest.json``; empty for a diffusers folder without one."""
    pipe: Any = None
    """The pipeline of a text-to-image model, None for a pixel model."""
    decoder: Any = None
    """A small decoder for clean estimates; None: the pipeline's own autoencoder."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised: images or latents."""
        if self.pipe is None:
            return self.image_shape
        return latent_shape(self.pipe.vae, self.image_shape)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextConditions:
        """Encode prompts in full precision: rounded, an encoding would depend on its batch."""
        with torch.autocast(self.pipe.text_encoder.device.type, enabled=False):
            return encode(self.pipe, prompts)

    def to(self, device: torch.device) -> None:
        """Move all networks to a device."""
        for part in (self.denoiser, self.pipe, self.decoder):
            if part is not None:
                part.to(device)

    def decode(self, x_0: Tensor) -> Tensor:
        """Decode clean samples to images (B, C, H, W); differentiable."""
        return x_0 if self.pipe is None else decode_latents(self.pipe.vae, x_0)

    def decode_estimate(self, x_0: Tensor) -> Tensor:
        """Decode clean estimates, with the small decoder if there is one."""
        return self.decode(x_0) if self.decoder is None else decode_latents(self.decoder, x_0)


def load_model(folder: Path, decoder: Path | None = None) -> LoadedModel:
    """Load a trained model folder or Stable-Diffusion-style pipeline; ``decoder`` is the folder of
    an AutoencoderTiny for a text-to-image model's latents."""
    folder = Path(folder)
    is_pipeline = (folder / "model_index.json").is_file()
    manifest = {} if is_pipeline else read_manifest(folder, "model")
    if is_pipeline or manifest.get("pipeline") is not None:
        model = _load_text_model(folder, manifest)
    else:
        model = _load_pixel_model(folder, manifest)
    if decoder is not None:
        if model.pipe is None:
            raise ValueError("--decoder is for text-to-image models; a pixel model has no latents")
        model.decoder = load_decoder(Path(decoder), model.pipe.vae)
    return model


def _load_pixel_model(folder: Path, manifest: dict[str, Any]) -> LoadedModel:
    network = load_network(UNet2DModel, folder / DIFFUSERS_NAME / "unet")
    scheduler = _load_scheduler(folder / DIFFUSERS_NAME / "scheduler")
    num_classes, image_shape = manifest.get("num_classes"), manifest.get("image_shape")
    size = network.config["sample_size"]
    sizes = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    expected = (network.config["in_channels"], *sizes)
    embeddings = network.config["num_class_embeds"]
    own = None if embeddings is None else embeddings - 1
    if not _is_shape(image_shape) or image_shape != list(expected) or num_classes != own:
        raise ValueError(f"{folder}: manifest.json and {DIFFUSERS_NAME}/unet are of two models")
    denoiser = Denoiser(network, num_classes).eval().requires_grad_(False)
    return LoadedModel(denoiser, scheduler, expected, num_classes, manifest)


def _load_text_model(folder: Path, manifest: dict[str, Any]) -> LoadedModel:
    pipe = load_pipeline(folder)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if manifest:
        shape = manifest.get("image_shape")
        if not _is_shape(shape):
            raise ValueError(f"{folder}/manifest.json has no valid image_shape")
        channels, height, width = shape
    else:
        size = pipe.unet.config.sample_size
        if not isinstance(size, int):
            raise ValueError(f"{folder}: its U-Net has no one sample_size but {short(size, 40)}")
        channels = pipe.vae.config.in_channels
        height = width = size * pipe.vae_scale_factor
    with torch.no_grad():
        null = encode(pipe, [""])
    denoiser = TextDenoiser(pipe.unet, (height, width), null)
    return LoadedModel(denoiser, pipe.scheduler, (channels, height, width), None, manifest, pipe)


def _load_scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    try:
        kind: Any = scheduler_class_named(check_scheduler(folder))
        return kind.from_pretrained(folder, local_files_only=True)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no scheduler: copy the model folder whole") from None
    except Exception as error:  # diffusers raises anything for wrong types
        raise ValueError(f"{path} is not a scheduler's configuration: {short(error)}") from error


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
    )
