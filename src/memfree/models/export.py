"""Writes a trained model as a diffusers folder that needs no memfree to load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline

from memfree.manifest import check_free_space, write_manifest

DIFFUSERS_NAME = "diffusers"


def export_model(folder: Path, network: Any, scheduler: Any, seed: int, **fields: Any) -> None:
    """Write ``folder/diffusers`` (safetensors) and ``folder/manifest.json`` of kind ``model``.

    The new model is complete on disk before it takes the place of an older one, and the manifest
    is absent while the two change places.

    Args:
        folder: the model folder; made if need be.
        network: the UNet2DModel to save.
        scheduler: the diffusers scheduler that is saved beside it.
        seed: of the training.
        fields: further manifest fields, JSON values.

    Raises:
        OSError: too little disk space.
    """
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    check_free_space(folder, size + 1_000_000)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / DIFFUSERS_NAME
    new, old = (folder / f".{DIFFUSERS_NAME}.{state}" for state in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline: Any = DDPMPipeline(unet=network, scheduler=scheduler)
    pipeline.save_pretrained(new, safe_serialization=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    write_manifest(
        folder,
        "model",
        seed,
        prediction_type=scheduler.config["prediction_type"],
        parameters=sum(p.numel() for p in network.parameters()),
        **fields,
    )
    shutil.rmtree(old, ignore_errors=True)
