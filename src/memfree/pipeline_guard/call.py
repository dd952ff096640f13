"""A guarded pipeline call: its arguments, batch and images."""

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

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
"""What a pipeline may return and be judged; latents are decoded for that."""


def as_tensor(
    images: Any, output_type: str, decode: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Finished images (n, C, H, W) float32 in [−1, 1] on ``device``.

    Args:
        images: what the pipeline returned.
        output_type: one of ``OUTPUT_TYPES``.
        decode: from latents to images.
        device: where the index is.
    """
    if output_type == "latent":
        with torch.no_grad():
            return decode(images).clamp(-1, 1)
    if output_type == "pt":
        made = images.detach().float()
    else:
        made = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        made = made.permute(0, 3, 1, 2)
        if output_type == "pil":
            return from_bytes(made).to(device)
        made = made.float()
    return (2 * made - 1).clamp(-1, 1).to(device)


def finite_rows(images: Tensor) -> Tensor:
    """(n,) bool: which images (n, ...) hold neither NaN nor ∞."""
    return images.detach().isfinite().flatten(1).all(dim=1)


class Watched:
    """A pipeline's image processor that shows what it makes an output of; otherwise unchanged.

    Only there it can be seen that an image is not finite: bytes have no NaN, and ∞ is clamped.

    Args:
        processor: the pipeline's.
        show: called with what ``postprocess`` is given.
    """

    def __init__(self, processor: Any, show: Callable[[Any], None]) -> None:
        self._processor = processor
        self._show = show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def postprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """As the processor's own."""
        self._show(image)
        return self._processor.postprocess(image, *args, **kwargs)


def images_of(output: Any) -> Any:
    """The images in what a pipeline returned."""
    return output[0] if isinstance(output, tuple) else output.images


def with_images(output: Any, images: Any) -> Any:
    """What the pipeline returned, with other images."""
    if isinstance(output, tuple):
        return (images, *output[1:])
    output.images = images
    return output


def put(images: Any, others: Any, at: Sequence[int]) -> Any:
    """The images with ``others`` in some places."""
    if isinstance(images, Tensor):
        images = images.clone()
    for place, other in zip(at, others, strict=True):
        images[place] = other
    return images


def put_flags(output: Any, again: Any, at: Sequence[int]) -> Any:
    """The safety checker's flags of the images that were drawn again, where there are any."""
    name = "nsfw_content_detected"
    old, new = getattr(output, name, None), getattr(again, name, None)
    if old is not None and new is not None:
        setattr(output, name, put(list(old), new, at))
    return output


def without(images: Any, at: Sequence[int]) -> Any:
    """The images as a list, with None in some places; unchanged where there are none."""
    if not at:
        return images
    gone = set(at)
    return [None if place in gone else image for place, image in enumerate(images)]


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


@dataclass(frozen=True)
class Call:
    """Arguments of one pipeline call by name, whatever the class of the pipeline calls its own.

    A subclass may hand arguments on as ``*args`` and ``**kw``, and set defaults of its own on the
    way: so only what the caller gave is passed, and the rest is known from the class that names it.
    """

    kind: Any
    """The pipeline's class."""
    given: Mapping[str, Any]
    """What is passed on."""
    defaults: Mapping[str, Any]
    """Of what is not given, by the first class that names it."""
    positional: tuple[str, ...] = ()
    """Names of what goes by position: what the class itself takes as ``*args``, and before it."""

    @classmethod
    def bind(cls, kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of ``kind.__call__``.

        Raises:
            TypeError: they are none of it, as Python says it.
        """
        inspect.signature(kind.__call__).bind(None, *args, **kwargs)
        given, defaults, positional = dict(kwargs), {}, []
        rest = list(args)
        for each in kind.__mro__:
            if "__call__" not in vars(each):
                continue
            _, *parameters = inspect.signature(vars(each)["__call__"]).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            for parameter in parameters:
                if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                    continue
                name, by_place = parameter.name, parameter.kind is not Parameter.KEYWORD_ONLY
                if name in given or name in defaults:
                    continue
                if by_place and rest:
                    given[name] = rest.pop(0)
                    positional.append(name)
                elif parameter.default is not Parameter.empty:
                    defaults[name] = parameter.default
            if not kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}:
                break
        if rest:
            raise TypeError(f"{kind.__name__}: nothing takes the last {len(rest)} arguments")
        return cls(kind, given, defaults, tuple(positional))

    @property
    def all(self) -> dict[str, Any]:
        """What is given, and the defaults of the rest."""
        return {**self.defaults, **self.given}

    def with_(self, **values: Any) -> Call:
        """The same call with other arguments."""
        return replace(self, given={**self.given, **values})

    def __call__(self, pipe: Any) -> Any:
        """Call the pipeline's own ``__call__``."""
        kinds = {one.kind for one in inspect.signature(self.kind.__call__).parameters.values()}
        if Parameter.VAR_POSITIONAL not in kinds:
            return self.kind.__call__(pipe, **self.given)
        by_name = {name: self.given[name] for name in self.given if name not in self.positional}
        return self.kind.__call__(pipe, *(self.given[name] for name in self.positional), **by_name)


def check_call(call: Mapping[str, Any]) -> None:
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
    scale = call.get("guidance_scale", 1.0)
    if not isinstance(scale, (Real, Tensor, np.ndarray)) or isinstance(scale, bool):
        raise ValueError(f"guidance_scale must be a number, not {scale!r}")
    if (output_type := call.get("output_type") or "pil") not in OUTPUT_TYPES:
        raise ValueError(
            f"memfree.guard cannot judge output_type {output_type!r}; use {', '.join(OUTPUT_TYPES)}"
        )
    if call.get("skip_guidance_layers") is not None:
        raise ValueError(
            "memfree.guard does not support skip_guidance_layers: skip-layer guidance calls the "
            "denoiser once more a step, with layers left out"
        )
    if call.get("padding_mask_crop") is not None:
        raise ValueError(
            "memfree.guard does not support padding_mask_crop: guidance would see the crop, and "
            "the verdict the whole image; crop the image first and guard the call on the crop"
        )


def check_branches(call: Mapping[str, Any], guidances: Sequence[Guidance], distilled: bool) -> None:
    """Refuse a guidance that needs the unconditional prediction where the pipeline makes none.

    Args:
        call: arguments of the pipeline call by name.
        guidances: in order.
        distilled: whether the denoiser is told the guidance scale, as latent consistency models
            are, and has one prediction whatever it is.

    Raises:
        ValueError: there is no unconditional prediction.
    """
    scale = call.get("guidance_scale")
    if not distilled and (scale is None or scale > 1):
        return
    for one in guidances:
        if getattr(one, "needs_unconditional", False):
            where = (
                "this denoiser, which is told the guidance scale, does not have: leave"
                if distilled
                else "the pipeline makes with a guidance_scale above 1 only, not "
                f"{scale:g}: raise it, or leave"
            )
            raise ValueError(
                f"memfree.guard: {type(one).__name__} needs the unconditional prediction for "
                f"captions of repeated images, which {where} captions undamped "
                "(damp_captions=False)"
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


def for_images(call: Call, family: Family, images: Sequence[int], controlnets: int = 1) -> Call:
    """The same call for some of its images, as one image a prompt; noise is not taken along.

    Args:
        call: the pipeline call.
        family: of the pipeline.
        images: their numbers in the call.
        controlnets: how many ControlNets the pipeline has, each with images of its own.
    """
    every = call.all
    prompts, each = prompt_count(every), images_per_prompt(every)
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
            part[family.control] = [_controls(one, places, prompts) for one in control]
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
    """The images of a ControlNet for images of these prompts; one image is everyone's."""
    alone = isinstance(value, (Tensor, np.ndarray)) and value.ndim < 4
    return value if alone else _spread(value, prompts, count)


def _given_images(value: Any, images: Sequence[int]) -> Any:
    """The images that image-to-image begins with, one each; a single one is everyone's.

    Image k of the call begins with the k-th of n, then again from the first, as in diffusers.
    """
    if isinstance(value, (list, tuple)) and [getattr(one, "ndim", 0) for one in value[:1]] == [4]:
        join: Any = torch.cat if isinstance(value[0], Tensor) else np.concatenate
        value = join(value)
    batch = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4
    if not (batch or isinstance(value, (list, tuple))):
        return [value] * len(images)
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
