"""A small decoder of the same latents (diffusers AutoencoderTiny), for clean estimates alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny

from memfree.models.latents import pixels_per_latent
from memfree.models.saved_network import load_network
from memfree.models.untrusted_folder import read_config


def load_decoder(folder: Path, vae: Any) -> Any:
    """Load the AutoencoderTiny that ``--decoder`` names, on the CPU and frozen.

    Args:
        folder: an ``AutoencoderTiny`` as diffusers saves it, such as TAESD.
        vae: the pipeline's own autoencoder, whose latents it must decode.

    Raises:
        ValueError: it is something else, damaged, or of other latents.
    """
    name = f"--decoder {folder}"
    config = folder / "config.json"
    if not config.is_file() or read_config(config).get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"{name} is no folder of a diffusers AutoencoderTiny")
    decoder = load_network(AutoencoderTiny, folder).eval().requires_grad_(False)
    check_decoder(decoder, vae, name)
    return decoder


def check_decoder(decoder: Any, vae: Any, name: str) -> None:
    """Refuse a decoder that does not make the autoencoder's images of its latents.

    Args:
        decoder: an ``AutoencoderTiny`` or ``AutoencoderKL``.
        vae: the pipeline's own autoencoder.
        name: what the message calls the decoder.

    Raises:
        ValueError: it takes latents of other channels, makes images of another size or channels,
            or is no autoencoder.
    """
    if not hasattr(decoder, "decode") or not hasattr(decoder, "config"):
        raise ValueError(f"{name} is a {type(decoder).__name__}, not an autoencoder")
    own, wanted = decoder.config.latent_channels, vae.config.latent_channels
    if own != wanted:
        raise ValueError(
            f"{name} takes latents of {own} channels, the pipeline's have {wanted}: use a decoder "
            "of the pipeline's own latents"
        )
    own, wanted = pixels_per_latent(decoder), pixels_per_latent(vae)
    if own != wanted or decoder.config.out_channels != vae.config.out_channels:
        raise ValueError(
            f"{name} makes {own}x{own} pixels of {decoder.config.out_channels} channels of each "
            f"latent, the pipeline's autoencoder {wanted}x{wanted} of {vae.config.out_channels}: "
            "use a decoder of the pipeline's own latents"
        )
