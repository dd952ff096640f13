"""Export of a trained model as a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from torch import nn

from memfree.folders.atomic import check_free_space, put_in_place, unfinished
from memfree.folders.manifest import write_manifest

DIFFUSERS_NAME = "diffusers"


def pipeline_folder(folder: Path) -> Path:
    """The diffusers folder in a model folder, or the folder itself."""
    inner = folder / DIFFUSERS_NAME
    return inner if inner.is_dir() else folder


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was_shown in zip(logs, shown, strict=True):
            if was_shown:
                log.enable_progress_bar()


def export_model(folder: Path, exported: Any, seed: int, **fields: Any) -> None:
    """Write ``folder/diffusers`` (safetensors) and ``manifest.json`` with ``fields`` (JSON). The
    new model is complete on disk before it replaces an older one; the manifest is absent
    meanwhile."""
    modules = [part for part in exported.components.values() if isinstance(part, nn.Module)]
    size = sum(p.numel() * p.element_size() for part in modules for p in part.parameters())
    check_free_space(folder, size + 1_000_000)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / DIFFUSERS_NAME
    with unfinished(target) as partial:
        with quiet_bars():
            exported.save_pretrained(partial, safe_serialization=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        put_in_place(partial, target, overwrite=True)
    write_manifest(
        folder,
        "model",
        seed,
        prediction_type=exported.scheduler.config["prediction_type"],
        parameters=sum(p.numel() for p in exported.unet.parameters()),
        **fields,
    )
