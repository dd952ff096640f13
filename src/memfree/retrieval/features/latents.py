"""Latents of a VAE as features, for multiplicity guidance in latent space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memfree.retrieval.features.base import Features, Metric, state_hash, unreadable
from memfree.retrieval.options import Arithmetic


class LatentFeatures(Features):
    """A VAE's posterior mode as a latent diffusion model uses it, compared by L2 distance: z =
    (mode − shift_factor) · scaling_factor, flattened, c·h·w float32. Images are not resized, and
    can be decoded from an index. Without the VAE's folder ``path``, loading an index needs
    ``weights``."""

    metric: Metric = "l2"
    reveals_images = True

    def __init__(
        self, vae: Any, path: Path | str | None = None, dtype: Arithmetic = "float32"
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path).absolute()
        self.vae = vae
        self.weights_sha256 = state_hash(self.vae)
        self.scaling_factor, self.shift_factor = scaling(self.vae)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae.to(self.dtype)
        self.vae.requires_grad_(False)
        self.eval()

    @classmethod
    def from_folder(cls, path: Path | str, dtype: Arithmetic = "float32") -> LatentFeatures:
        """Load the VAE of a diffusers folder: a pipeline's, or its ``vae`` subfolder."""
        # Slow imports: they take seconds.
        from diffusers import AutoencoderKL

        from memfree.folders.untrusted_models import check_network

        folder = Path(path).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"no VAE or pipeline folder at {folder}")
        inner = folder / "vae" if (folder / "vae").is_dir() else folder
        with unreadable(f"{inner} holds no AutoencoderKL in safetensors", OSError):
            check_network(AutoencoderKL, inner)
            vae = AutoencoderKL.from_pretrained(inner, use_safetensors=True, local_files_only=True)
        return cls(vae, folder, dtype)

    def train(self, mode: bool = True) -> LatentFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) float32 of images (B, C, H, W) in [-1, 1]."""
        channels = int(self.vae.config.in_channels)
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        if images.shape[1] != channels:
            raise ValueError(f"the VAE takes {channels} channels, not {images.shape[1]}")
        with torch.autocast(images.device.type, enabled=False):
            mode = self.vae.encode(images.to(self.dtype)).latent_dist.mode()
        mode = mode.to(torch.promote_types(mode.dtype, torch.float32))
        return (mode - self.shift_factor) * self.scaling_factor

    def forward(self, images: Tensor) -> Tensor:
        """Flattened latents (B, c·h·w)."""
        return self.latents(images).flatten(1)

    def are_of(self, vae: Any) -> bool:
        """Whether another autoencoder's encoder weights give the same latents, up to half-precision
        rounding. Weights offloaded to no device count as equal."""
        other = getattr(vae, "_orig_mod", vae)  # under torch.compile
        if scaling(other) != (self.scaling_factor, self.shift_factor):
            return False
        parts = ("encoder.", "quant_conv.")  # what latents depend on
        own, others = (
            {name: value for name, value in each.state_dict().items() if name.startswith(parts)}
            for each in (self.vae, other)
        )
        return own.keys() == others.keys() and all(
            _close(weight, others[name]) for name, weight in own.items()
        )

    def describe(self) -> dict[str, Any]:
        """The VAE's folder, hash and factors."""
        return {
            "name": "vae-latents",
            "path": None if self.path is None else str(self.path),
            "weights_sha256": self.weights_sha256,
            "preprocessing": "[-1, 1], not resized; a single channel is repeated",
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "dtype": str(self.dtype).removeprefix("torch."),
            "output": "mode of the posterior, minus shift, times scale, flattened",
            "metric": self.metric,
        }


def scaling(vae: Any) -> tuple[float, float]:
    """The autoencoder's scaling and shift factors."""
    config = vae.config
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


def check_latents(features: Features, vae: Any, name: str) -> None:
    """Refuse references other than latents of the pipeline's ``vae``; ``name`` is the option."""
    if not isinstance(features, LatentFeatures):
        raise ValueError(
            f"{name} is an index of {features.describe()['name']}, not of latents: give one that "
            "`memfree index --features latents` wrote"
        )
    if not features.are_of(vae):
        raise ValueError(
            f"{name} holds latents of another autoencoder than the pipeline's: index with "
            "--features latents and --extractor.path of this model"
        )


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if "meta" in (first.device.type, second.device.type):
        return True
    other = second.to(first.device).float()
    return torch.allclose(first.float(), other, rtol=2**-7, atol=1e-6)
