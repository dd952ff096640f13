"""Options of feature extractors (no torch here, so that ``--help`` is quick)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SSCDModel = Literal[
    "disc_mixup",
    "disc_large",
    "disc_blur",
    "disc_advanced",
    "imagenet_blur",
    "imagenet_advanced",
    "imagenet_mixup",
]
"""The published files sscd_MODEL.torchscript.pt."""


SSCDPreprocessing = Literal["authors_288", "authors_320", "dcr", "dcr_search", "amg"]
"""The five ways in which the literature prepares images for SSCD."""


Arithmetic = Literal["float32", "bfloat16"]


FeatureName = Literal["pixels", "efficientnet", "sscd", "clip", "timm", "latents", "copy_detection"]


@dataclass(frozen=True)
class ExtractorOptions:
    """Options of a feature extractor."""

    path: Path | None = None
    """Local weights. sscd: the TorchScript file; clip: a checkpoint, or a folder with
    open_clip_config.json; timm: safetensors or a state dict; latents: a VAE or pipeline folder;
    copy_detection: the folder of `memfree train-embedding`."""
    model: str | None = None
    """Architecture: open_clip's name (clip: ViT-B-32 by default) or timm's (timm)."""
    pretrained: str | None = None
    """Published weights to download instead of a path. clip: open_clip's tag; timm: true."""
    sscd_model: SSCDModel = "disc_mixup"
    """The published SSCD model in the file."""
    preprocessing: SSCDPreprocessing = "authors_288"
    """How images are prepared for SSCD: authors_288 (shorter side 288, ImageNet mean and
    deviation), authors_320 (320x320, the same), dcr (256, centre 224, mean and deviation 0.5),
    dcr_search (256, centre 224, ImageNet), amg (224x224, not normalised)."""
    trust_file: bool = False
    """Load the SSCD file, which is a program, even if its SHA-256 is not on the known list."""
    seed: int = 0
    """Seed of timm's random weights, used without path and pretrained."""
    dtype: Arithmetic = "float32"
    """Arithmetic of the network; vectors are float32 in any case."""


CaptionPolicy = Literal["most_common", "nearest"]
