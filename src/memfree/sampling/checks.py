"""Checks before sampling that scheduler, index, model and conditions fit together."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from memfree.guidance import TEXT_ONLY, GuidanceSettings, default_similarity
from memfree.guidance.baselines import TextTools
from memfree.models import LoadedModel
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.latents import check_latents
from memfree.sampling.sample_run import SchedulerName

_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    # Clamping x̂_0 without DDIM's ε̂ derails classifier-free guided samples.
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmsolver++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def build_scheduler(name: SchedulerName, trained: Any) -> Any:
    """The sampler ``name`` with betas, prediction type and spacing of the ``trained`` scheduler."""
    kind, changes = _CLASSES[name]
    return kind.from_config(trained.config, **changes)


def index_state(index: ReferenceIndex | None) -> dict[str, str | None]:
    """Hashes of what samples depend on in an index: its contents and its calibration."""
    if index is None:
        return {"index_sha256": None, "calibration_sha256": None}
    calibration = json.dumps(index.calibrations[default_similarity(index).name], sort_keys=True)
    return {
        "index_sha256": vectors_hash(index),
        "calibration_sha256": hashlib.sha256(calibration.encode()).hexdigest(),
    }


def vectors_hash(index: ReferenceIndex) -> str:
    """SHA-256 over an index's rows, extractor, counts, keys and conditions."""
    digest = hashlib.sha256(index.vectors.detach().cpu().contiguous().numpy().tobytes())
    for column in (index.group, index.multiplicity):
        digest.update(column.cpu().numpy().tobytes())
    known = {"features": index.features.describe(), "num_classes": index.num_classes}
    digest.update(json.dumps(known, sort_keys=True).encode())
    # Line by line: an index may have millions of rows, each with several captions.
    for key in index.keys:
        digest.update(json.dumps(key).encode() + b"\n")
    for batch in index.items.conditions.to_batches(max_chunksize=4096):
        digest.update("".join(f"{json.dumps(row)}\n" for row in batch.to_pylist()).encode())
    return digest.hexdigest()


def refuse_text_only(guidance: GuidanceSettings, model: LoadedModel) -> None:
    """Refuse a mitigation of prompts or text embeddings if the model takes no text."""
    if model.pipe is None and guidance.mitigation in TEXT_ONLY:
        raise ValueError(f"--mitigation {guidance.mitigation} needs a text-to-image model")


def refuse_wrong_settings(
    guidance: GuidanceSettings, model: LoadedModel, index: ReferenceIndex | None
) -> None:
    """Refuse before sampling what the mitigation itself would refuse later."""
    tools = None if model.pipe is None else TextTools.of(model.pipe.tokenizer, index)
    guidance.check(index, tools)


def labels_in_turn(
    classes: list[int] | int | None, model: LoadedModel, guidance_scale: float
) -> list[int] | None:
    """The labels to cycle through; None for an unconditional model."""
    if isinstance(classes, int):
        classes = [classes]
    if model.num_classes is None:
        if classes is not None:
            raise ValueError("--classes needs a class-conditional model; this one has no classes")
        if guidance_scale != 1:
            option = f"--guidance_scale {guidance_scale:g}"
            raise ValueError(f"{option} needs a class-conditional model; leave it at 1")
        return None
    if classes is None:
        return list(range(model.num_classes))
    if not classes:
        raise ValueError("--classes is empty; leave it out for all classes in turn")
    largest, last = max(classes), model.num_classes - 1
    if largest > last:
        raise ValueError(f"--classes {largest} is not a class of this model: 0 to {last}")
    return classes


def latents_for(path: Path | None, model: LoadedModel, guidance: GuidanceSettings) -> Any:
    """Load references of multiplicity guidance; refuse features other than the model's latents."""
    if model.pipe is None:
        if path is not None:
            raise ValueError("--latents is for text-to-image models; a pixel model has --index")
        return None
    if guidance.mitigation not in ("multiplicity", "both"):
        return None
    if path is None:
        raise ValueError(
            f"--mitigation {guidance.mitigation} of a text-to-image model needs "
            "--latents: an index that `memfree index --features latents` wrote"
        )
    index = ReferenceIndex.load(path)
    check_latents(index.features, model.pipe.vae, f"--latents {path}")
    held, size = index.vectors.shape[1], math.prod(model.noise_shape)
    if held != size:
        raise ValueError(
            f"--latents {path} holds vectors of {held} values, the model's latents have {size}: "
            "index images of the size that it makes"
        )
    if index.captions is None:
        raise ValueError(f"--latents {path} has no captions: index captioned images")
    return index


def refuse_without_captions(
    path: Path,
    index: ReferenceIndex,
    model: LoadedModel,
    guidance: GuidanceSettings,
    guidance_scale: float,
) -> None:
    """Refuse an index without captions if AMG needs them for a text-to-image model."""
    used = model.pipe is not None and guidance_scale > 1 and guidance.needs_captions
    if used and index.captions is None:
        raise ValueError(
            f"--index {path} has no captions, which --mitigation.c2 steers away from: index "
            "captioned images, or pass --mitigation.c2 0"
        )


def scheduler_for(name: SchedulerName, model: LoadedModel, steps: int) -> Any:
    """The sampler ``name`` for this model; refuses more steps than it was trained with."""
    trained_steps = model.scheduler.config.num_train_timesteps
    if steps > trained_steps:
        raise ValueError(f"--steps {steps} is more than the model's {trained_steps} timesteps")
    return build_scheduler(name, model.scheduler)


def index_for(
    path: Path, model: LoadedModel, guidance: GuidanceSettings, allow_other_dataset: bool
) -> ReferenceIndex:
    """Load the index; refuse one that cannot guide this model."""
    index = ReferenceIndex.load(path)
    held, wanted = tuple(index.image_shape), tuple(model.image_shape)
    if held != wanted:
        raise ValueError(f"--index {path} has images {held}, but the model makes {wanted}")
    hashes = {model.manifest.get("dataset_hash"), index.dataset_hash}
    if None not in hashes and len(hashes) > 1 and not allow_other_dataset:
        raise ValueError(
            f"--index {path} was built from a different dataset than the model: index the model's "
            "dataset or pass --allow_other_dataset true"
        )
    guidance.end_threshold(index)  # refuses an index that is not calibrated
    return index
