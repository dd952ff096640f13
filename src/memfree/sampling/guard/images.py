"""A pipeline's images as tensors in [−1, 1], and images replaced in what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        arrays = [np.asarray(image, dtype=np.float32) for image in images]
        made = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        made = made / 255 if output_type == "pil" else made
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
