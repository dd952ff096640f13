"""A trained model as sampling and guidance use it: a function of x_t, t and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from memfree.conditions import TextConditions
from memfree.folders.manifest import read_manifest
from memfree.models.export import DIFFUSERS_NAME
from memfree.models.latents import decode_latents, latent_shape
from memfree.models.noise_schedule import scheduler_class_named
from memfree.models.saved_network import load_network
from memfree.models.small_decoder import load_decoder
from memfree.models.text_pipeline import TextDenoiser, encode, load_pipeline
from memfree.models.untrusted_folder import check_scheduler
from memfree.untrusted import short

MAX_SIDE = 1 << 14
"""Largest height or width of images that a model is believed to make, pixels."""


class Denoiser(nn.Module):
    """A U-Net with one calling convention for unconditional and class-conditional models."""

    def __init__(self, network: Any, num_classes: int | None = None) -> None:
        """Wrap ``network``.

        Args:
            network: the UNet2DModel; class-conditional ones have ``num_classes + 1`` embeddings.
            num_classes: None for an unconditional network.
        """
        super().__init__()
        self.network = network
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor | int, conditions: Tensor | None = None) -> Tensor:
        """Predict what the scheduler's ``config.prediction_type`` says, (B, C, H, W).

        Args:
            x_t: noisy images (B, C, H, W).
            t: timestep of all, 0-d or int, or of each, (B,).
            conditions: labels (B,) int64, ``num_classes`` meaning none. None: no label at all.

        Raises:
            ValueError: labels for an unconditional model.
        """
        if self.num_classes is None and conditions is not None:
            raise ValueError("conditions were given, but the model is unconditional")
        if conditions is None:
            conditions = self.unconditional(len(x_t), x_t.device)
        return self.network(x_t, t, class_labels=conditions, return_dict=False)[0]

    def unconditional(self, count: int, device: torch.device) -> Tensor | None:
        """The label that means none, (count,) int64; None for an unconditional model."""
        if self.num_classes is None:
            return None
        return torch.full((count,), self.num_classes, device=device)


@dataclass
class LoadedModel:
    """A model folder in memory."""

    denoiser: nn.Module
    """Called as ``denoiser(x_t, t, conditions)``; in evaluation mode, on the CPU, without
    gradients to its weights."""
    scheduler: Any
    """The diffusers scheduler saved with the model."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    num_classes: int | None
    """None for a model without classes."""
    manifest: dict[str, Any]
    """``manifest.json`` of the folder; empty for a diffusers folder without one."""
    pipe: Any = None
    """The whole pipeline of a text-to-image model, None for a pixel model."""
    decoder: Any = None
    """A small decoder of its latents for clean estimates; None: the pipeline's own autoencoder."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the denoiser denoises: images or latents."""
        if self.pipe is None:
            return self.image_shape
        return latent_shape(self.pipe.vae, self.image_shape)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextConditions:
        """What the denoiser of a text-to-image model is told of prompts, one each.

        Whatever autocast says: rounded, the same caption would differ from batch to batch.
        """
        with torch.autocast(self.pipe.text_encoder.device.type, enabled=False):
            return encode(self.pipe, prompts)

    def to(self, device: torch.device) -> None:
        """Move all networks to a device."""
        self.denoiser.to(device)
        if self.pipe is not None:
            self.pipe.to(device)
        if self.decoder is not None:
            self.decoder.to(device)

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, C, H, W) of clean samples; differentiable."""
        return x_0 if self.pipe is None else decode_latents(self.pipe.vae, x_0)

    def decode_estimate(self, x_0: Tensor) -> Tensor:
        """The same of clean estimates on the way, by the small decoder where there is one."""
        return self.decode(x_0) if self.decoder is None else decode_latents(self.decoder, x_0)


def load_model(folder: Path, decoder: Path | None = None) -> LoadedModel:
    """Load the model folder that training left behind, or a Stable-Diffusion-style pipeline.

    Args:
        folder: the model.
        decoder: folder of a small decoder of a text-to-image model's latents; see ``load_decoder``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a finished model folder, or its parts do not belong together.
    """
    folder = Path(folder)
    model = _load_model(folder)
    if decoder is not None:
        if model.pipe is None:
            raise ValueError("--decoder is for text-to-image models; a pixel model has no latents")
        model.decoder = load_decoder(Path(decoder), model.pipe.vae)
    return model


def _load_model(folder: Path) -> LoadedModel:
    if (folder / "model_index.json").is_file():
        return _load_text_model(folder, {})
    manifest = read_manifest(folder, "model")
    if manifest.get("pipeline") is not None:
        return _load_text_model(folder, manifest)
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
    return LoadedModel(
        denoiser=Denoiser(network, num_classes).eval().requires_grad_(False),
        scheduler=scheduler,
        image_shape=expected,
        num_classes=num_classes,
        manifest=manifest,
    )


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
    return LoadedModel(
        denoiser=TextDenoiser(pipe.unet, (height, width), null),
        scheduler=pipe.scheduler,
        image_shape=(channels, height, width),
        num_classes=None,
        manifest=manifest,
        pipe=pipe,
    )


def _load_scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    try:
        kind: Any = scheduler_class_named(check_scheduler(folder))
        return kind.from_pretrained(folder, local_files_only=True)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no scheduler: copy the model folder whole") from None
    except Exception as error:  # whatever diffusers raises for options of wrong types
        raise ValueError(f"{path} is not a scheduler's configuration: {short(error)}") from error


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether a manifest's image_shape could be one."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
    )
