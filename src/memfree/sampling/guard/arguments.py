"""Arguments of a pipeline call: checked, and taken for some of its images alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memfree.guidance import Guidance
from memfree.sampling.guard.families import Family
from memfree.sampling.guard.images import OUTPUT_TYPES

_TEXTS = ("prompt", "prompt_2", "prompt_3")
_PER_PROMPT = (
    *_TEXTS,
    *(f"negative_{name}" for name in _TEXTS),
    *(
        f"{sign}{name}"
        for sign in ("", "negative_")
        for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    ),
)
"""Arguments with an entry a prompt, where they are a list or a tensor."""


def check_call(call: Mapping[str, Any], family: Family) -> None:
    """Refuse a pipeline call that the guard cannot follow.

    Raises:
        ValueError: there are no prompts or they are no texts, or no images, or an option changes
            how often the denoiser is called or what is finished.
    """
    for name in _TEXTS:
        value = call.get(name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a text or a list of texts, not {value!r}")
        if not value:
            raise ValueError(f"{name} is an empty list: there is nothing to draw")
        wrong = next((one for one in value if not isinstance(one, str)), None)
        if wrong is not None or None in value:
            raise ValueError(f"{name} must hold texts, not {wrong!r}")
    if call.get("prompt") is None and call.get("prompt_embeds") is None:
        raise ValueError("the pipeline call needs a prompt, or prompt_embeds")
    each = call.get("num_images_per_prompt")
    if each is not None and (not isinstance(each, Integral) or each < 1):
        raise ValueError(f"num_images_per_prompt must be a whole number above 0, not {each!r}")
    if (output_type := call.get("output_type") or "pil") not in OUTPUT_TYPES:
        raise ValueError(
            f"memfree.guard cannot judge output_type {output_type!r}; use {', '.join(OUTPUT_TYPES)}"
        )
    if call.get("skip_guidance_layers") is not None:
        raise ValueError(
            "memfree.guard does not support skip_guidance_layers: skip-layer guidance calls the "
            "denoiser once more a step, with layers left out"
        )
    if call.get("denoising_end") is not None:
        raise ValueError(
            "memfree.guard does not support denoising_end: the images are not finished, so there "
            "is no verdict; guard the pipeline that finishes them"
        )


def check_branches(call: Mapping[str, Any], guidances: Sequence[Guidance]) -> None:
    """Refuse a guidance that needs the unconditional prediction where the pipeline makes none.

    Raises:
        ValueError: the guidance scale is not above 1.
    """
    scale = call.get("guidance_scale")
    if scale is None or scale > 1:
        return
    for one in guidances:
        if getattr(one, "needs_unconditional", False):
            raise ValueError(
                f"memfree.guard: {type(one).__name__} needs the unconditional prediction for "
                "captions of repeated images, which the pipeline makes with a guidance_scale above "
                f"1 only, not {scale:g}: raise it, or leave captions undamped (damp_captions=False)"
            )


def prompt_count(call: Mapping[str, Any]) -> int:
    """Prompts of the call."""
    prompt = call.get("prompt")
    if prompt is None:
        return len(call["prompt_embeds"])
    return 1 if isinstance(prompt, str) else len(prompt)


def image_count(call: Mapping[str, Any]) -> int:
    """Images that the call will return."""
    return prompt_count(call) * images_per_prompt(call)


def images_per_prompt(call: Mapping[str, Any]) -> int:
    """``num_images_per_prompt``, 1 by default."""
    return int(call.get("num_images_per_prompt") or 1)


def for_images(call: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """The same call for some of its images, as one image a prompt; noise is not taken along."""
    prompts, each = prompt_count(call), images_per_prompt(call)
    part = dict(call)
    for name in _PER_PROMPT:
        if name in part:
            part[name] = _spread(part[name], [image // each for image in images], prompts)
    if "image" in part:
        part["image"] = _given_images(part["image"], images)
    part["num_images_per_prompt"] = 1
    return part


def _spread(value: Any, prompts: list[int], count: int) -> Any:
    if isinstance(value, str):
        return [value] * len(prompts)
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[prompt] for prompt in prompts]
    if isinstance(value, Tensor) and len(value) == count:
        return value[torch.tensor(prompts, device=value.device)]
    return value


def _given_images(value: Any, images: Sequence[int]) -> Any:
    """The images that image-to-image begins with; one image, in whatever form, is everyone's.

    Image k of the call begins with the k-th of n, then again from the first, as in diffusers.
    """
    if isinstance(value, (list, tuple)) and [getattr(one, "ndim", 0) for one in value[:1]] == [4]:
        join: Any = torch.cat if isinstance(value[0], Tensor) else np.concatenate
        value = join(value)
    batch = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4
    if not (batch or isinstance(value, (list, tuple))) or len(value) < 2:
        return value
    places = [image % len(value) for image in images]
    return value[places] if batch else [value[place] for place in places]


def texts(call: Mapping[str, Any]) -> list[str] | None:
    """The prompt of every image; None where the call gives embeddings instead."""
    prompt = call.get("prompt")
    if prompt is None:
        return None
    each = images_per_prompt(call)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in prompts for _ in range(each)]
