"""A guarded pipeline call: its arguments, batch and returned images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memfree.guidance import Guidance
from memfree.images import from_bytes
from memfree.pipeline_guard.families import Family

OUTPUT_TYPES = ("pil", "np", "pt", "latent")  # those that can be judged


def as_tensor(
    images: Any, output_type: str, decode: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Finished images of a pipeline as (n, C, H, W) float32 in [−1, 1] on a device."""
    if output_type == "latent":
        with torch.no_grad():
            return decode(images).clamp(-1, 1)
    if output_type == "pt":
        pixels = images.detach()
    else:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        pixels = pixels.permute(0, 3, 1, 2)
    if output_type == "pil":
        return from_bytes(pixels).to(device)
    return (2 * pixels.float() - 1).clamp(-1, 1).to(device)


def finite_rows(images: Tensor) -> Tensor:
    """(n,) bool: which images (n, ...) contain neither NaN nor ∞."""
    return images.detach().isfinite().flatten(1).all(dim=1)


class Watched:
    """An image processor that shows the input of ``postprocess``, which clamps NaN and ∞."""

    def __init__(self, processor: Any, show: Callable[[Any], None]) -> None:
        self._processor = processor
        self._show = show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def postprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Show the image, then process it as usual."""
        self._show(image)
        return self._processor.postprocess(image, *args, **kwargs)


def images_of(output: Any) -> Any:
    """The images in a pipeline's output."""
    return output[0] if isinstance(output, tuple) else output.images


def with_images(output: Any, images: Any) -> Any:
    """A pipeline's output with other images."""
    if isinstance(output, tuple):
        return (images, *output[1:])
    output.images = images
    return output


def without(output: Any, refused: Sequence[int]) -> Any:
    """A pipeline's output with None in place of the refused images."""
    if not refused:
        return output
    images = enumerate(images_of(output))
    return with_images(output, [None if i in refused else image for i, image in images])


def drawn_again(output: Any, again: Any, at: Sequence[int]) -> Any:
    """A pipeline's output with some images, and their safety flags, taken from another draw."""

    def put(values: Any, others: Any) -> Any:
        values = values.clone() if isinstance(values, Tensor) else values
        for place, other in zip(at, others, strict=True):
            values[place] = other
        return values

    name = "nsfw_content_detected"
    old, new = getattr(output, name, None), getattr(again, name, None)
    if old is not None and new is not None:
        setattr(output, name, put(list(old), new))
    return with_images(output, put(images_of(output), images_of(again)))


_TEXTS = ("prompt", "prompt_2", "prompt_3")
_EMBEDS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
_PER_PROMPT = [f"{sign}{name}" for sign in ("", "negative_") for name in (*_TEXTS, *_EMBEDS)]
"""Arguments with one entry per prompt if they are lists or tensors."""
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """Arguments of one pipeline call by name; a subclass's own defaults stay unless given."""

    kind: Any  # the pipeline's class
    given: Mapping[str, Any]  # what is passed on
    defaults: Mapping[str, Any]  # of other arguments, by the first class that declares them
    positional: tuple[str, ...] = ()  # names passed by position, for classes with ``*args``

    @classmethod
    def bind(cls, kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Bind arguments of ``kind.__call__``; TypeError, in Python's words, if they do not fit."""
        inspect.signature(kind.__call__).bind(None, *args, **kwargs)
        given, defaults, positional = dict(kwargs), {}, []
        rest = list(args)
        for owner in kind.__mro__:
            if "__call__" not in vars(owner):
                continue
            _, *parameters = inspect.signature(vars(owner)["__call__"]).parameters.values()
            named = [each for each in parameters if each.kind not in _VARIADIC]
            for parameter in named:
                name = parameter.name
                if name in given or name in defaults:
                    continue
                if rest and parameter.kind is not Parameter.KEYWORD_ONLY:
                    given[name] = rest.pop(0)
                    positional.append(name)
                elif parameter.default is not Parameter.empty:
                    defaults[name] = parameter.default
            if len(named) == len(parameters):
                break
        if rest:
            raise TypeError(f"{kind.__name__}: nothing takes the last {len(rest)} arguments")
        return cls(kind, given, defaults, tuple(positional))

    @property
    def all(self) -> dict[str, Any]:
        """Given arguments and the defaults of the others."""
        return {**self.defaults, **self.given}

    def with_(self, **values: Any) -> Call:
        """The same call with other arguments."""
        return replace(self, given={**self.given, **values})

    def __call__(self, pipe: Any) -> Any:
        """Call the pipeline's own ``__call__``."""
        parameters = inspect.signature(self.kind.__call__).parameters.values()
        by_name, args = dict(self.given), []
        if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
            args = [by_name.pop(name) for name in self.positional]
        return self.kind.__call__(pipe, *args, **by_name)


def check_call(call: Mapping[str, Any]) -> None:
    """Refuse a pipeline call that draws nothing or that the guard cannot follow."""
    for name in _TEXTS:
        value = call.get(name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a text or a list of texts, not {value!r}")
        if not value:
            raise ValueError(f"{name} is an empty list: there is nothing to draw")
        for text in value:
            if not isinstance(text, str):
                raise ValueError(f"{name} must hold texts, not {text!r}")
    if call.get("prompt") is None and call.get("prompt_embeds") is None:
        raise ValueError("the pipeline call needs a prompt, or prompt_embeds")
    each = call.get("num_images_per_prompt")
    if each is not None and (not isinstance(each, Integral) or each < 1):
        raise ValueError(f"num_images_per_prompt must be a whole number above 0, not {each!r}")
    scale = call.get("guidance_scale", 1.0)
    if not isinstance(scale, (Real, Tensor, np.ndarray)) or isinstance(scale, bool):
        raise ValueError(f"guidance_scale must be a number, not {scale!r}")
    if (output_type := call.get("output_type") or "pil") not in OUTPUT_TYPES:
        raise ValueError(
            f"memfree.guard cannot judge output_type {output_type!r}; use {', '.join(OUTPUT_TYPES)}"
        )
    for name, why in _UNSUPPORTED.items():
        if call.get(name) is not None:
            raise ValueError(f"memfree.guard does not support {name}: {why}")


_UNSUPPORTED = {
    "skip_guidance_layers": "skip-layer guidance calls the denoiser once more a step, with layers "
    "left out",
    "padding_mask_crop": "guidance would see the crop, and the verdict the whole image; crop the "
    "image first and guard the call on the crop",
}
"""Options of pipeline calls that the guard cannot follow, and why."""


def check_branches(call: Mapping[str, Any], guidances: Sequence[Guidance], distilled: bool) -> None:
    """Refuse guidance that needs the unconditional prediction if the call makes none."""
    scale = call.get("guidance_scale")
    if not distilled and (scale is None or scale > 1):
        return
    only = "a denoiser that is told it" if distilled else f"guidance_scale {scale:g}"
    for guidance in guidances:
        if getattr(guidance, "needs_unconditional", False):
            raise ValueError(
                f"memfree.guard: {type(guidance).__name__} needs the unconditional prediction for "
                "captions of repeated images, which pipelines make with a guidance_scale above 1, "
                f"not with {only}: change that, or leave captions undamped (damp_captions=False)"
            )


def prompt_count(call: Mapping[str, Any]) -> int:
    """Number of prompts in the call."""
    prompt = call.get("prompt")
    if prompt is None:
        return len(call["prompt_embeds"])
    return 1 if isinstance(prompt, str) else len(prompt)


def images_per_prompt(call: Mapping[str, Any]) -> int:
    """``num_images_per_prompt``, 1 by default."""
    return int(call.get("num_images_per_prompt") or 1)


def image_count(call: Mapping[str, Any]) -> int:
    """Number of images that the call returns."""
    return prompt_count(call) * images_per_prompt(call)


def texts(call: Mapping[str, Any]) -> list[str] | None:
    """The prompt of each image; None if the call gives embeddings instead."""
    prompt = call.get("prompt")
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return [text for text in prompts for _ in range(images_per_prompt(call))]


def for_images(call: Call, family: Family, images: Sequence[int], controlnets: int = 1) -> Call:
    """The same call for some of its images, with one prompt for each image and fresh noise."""
    prompts, each = prompt_count(call.all), images_per_prompt(call.all)
    part: dict[str, Any] = {"num_images_per_prompt": 1}
    places = [image // each for image in images]
    for name in _PER_PROMPT:
        if name in call.given:
            part[name] = _spread(call.given[name], places, prompts)
    for name in ("image", "mask_image", "masked_image_latents"):
        if call.given.get(name) is not None and name != family.control:
            part[name] = _given_images(call.given[name], images)
    if (control := call.given.get(family.control)) is not None:
        nested = isinstance(control, (list, tuple)) and isinstance(control[0], (list, tuple))
        if controlnets == 1 or (nested and family.control_by_prompt):
            part[family.control] = _controls(control, places, prompts)
        else:
            part[family.control] = [_controls(own, places, prompts) for own in control]
    return call.with_(**part)


def _spread(value: Any, prompts: list[int], count: int) -> Any:
    if isinstance(value, str):
        return [value] * len(prompts)
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[prompt] for prompt in prompts]
    if isinstance(value, (Tensor, np.ndarray)) and len(value) == count:
        return value[prompts]
    return value


def _controls(value: Any, prompts: list[int], count: int) -> Any:
    alone = isinstance(value, (Tensor, np.ndarray)) and value.ndim < 4
    return value if alone else _spread(value, prompts, count)


def _given_images(value: Any, images: Sequence[int]) -> Any:
    """Image k of the call starts from given image k mod n, as in diffusers."""
    if isinstance(value, (list, tuple)) and value and getattr(value[0], "ndim", 0) == 4:
        value = (torch.cat if isinstance(value[0], Tensor) else np.concatenate)(value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4:
        return value[[image % len(value) for image in images]]
    if isinstance(value, (list, tuple)):
        return [value[image % len(value)] for image in images]
    return [value] * len(images)
