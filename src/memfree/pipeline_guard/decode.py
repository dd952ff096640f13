"""Decoding of latents to images, in pieces, for guidance and verdicts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memfree.models.loading import check_decoder, decode_latents
from memfree.out_of_memory import explained_memory
from memfree.retrieval import PixelFeatures
from memfree.retrieval.features.latents import check_latents

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class Decoder:
    """Decodes with the pipeline's autoencoder, estimates also with a smaller one; differentiable.

    Args:
        autoencoder: the pipeline's.
        index: what the images are compared with.
        chunk_size: latents decoded at a time; None: the whole batch. Gradients of a piece are made
            by decoding it again, so that one piece's activations are held at a time.
        small: an ``AutoencoderTiny`` of the same latents for the estimates; None: the pipeline's.
        latents: references that must be in the autoencoder's latents; None: there are none.

    Raises:
        ValueError: ``small`` or ``latents`` is of other latents.
    """

    def __init__(
        self,
        autoencoder: Any,
        index: ReferenceIndex,
        chunk_size: int | None,
        small: Any = None,
        latents: ReferenceIndex | None = None,
    ) -> None:
        self.index = index
        self.chunk_size = chunk_size
        self._given_small = small
        self._latents = latents
        self._use(autoencoder)

    def _use(self, autoencoder: Any) -> None:
        if self._given_small is not None:
            check_decoder(self._given_small, autoencoder, "memfree.guard: decoder")
        if self._latents is not None:
            check_latents(self._latents.features, autoencoder, "memfree.guard: latents=")
        self.autoencoder = autoencoder
        self.small = autoencoder if self._given_small is None else self._given_small
        self.draws: dict[str, bool] = {}
        """Which parts of the guard draw random numbers; see ``OwnRandomness.if_drawn``."""
        self._copy: Any = None
        self._fitting: torch.Size | None = None  # asked once a size: it costs an embedding

    def follow(self, autoencoder: Any) -> None:
        """Decode with the autoencoder that the pipeline has now: it may have been replaced.

        Raises:
            ValueError: the small decoder or the references are of other latents.
        """
        if autoencoder is not self.autoencoder:
            self._use(autoencoder)

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [−1, 1], of the denoiser's latents (B, C, h, w).

        Raises:
            ValueError: the index cannot be compared with images of this size.
        """
        if self._overflows():
            return self._decoded(self._float32(latents.device), latents)
        return self._decoded(self.autoencoder, latents)

    def estimate(self, latents: Tensor) -> Tensor:
        """The same of clean estimates on the way, by the smaller autoencoder."""
        if self.small is self.autoencoder:
            return self(latents)
        return self._decoded(self.small, latents)

    def finished(self, latents: Tensor) -> Tensor:
        """Images in [−1, 1], as a pipeline returns them: beyond white and black nothing counts."""
        return self(latents).clamp(-1, 1)

    def ways(self) -> list[str]:
        """What lowers the memory of decoding besides smaller pieces."""
        cheap = self.small is not self.autoencoder
        return [] if cheap else ["a decoder such as diffusers' AutoencoderTiny"]

    def _decoded(self, autoencoder: Any, latents: Tensor) -> Tensor:
        pieces = latents.split(self.chunk_size or max(1, len(latents)))
        if len(pieces) > 1 and latents.requires_grad and torch.is_grad_enabled():
            parts = [
                checkpoint(decode_latents, autoencoder, piece, use_reentrant=False)
                for piece in pieces
            ]
        else:
            parts = [decode_latents(autoencoder, piece) for piece in pieces]
        images = torch.cat(parts)
        if images.shape[1:] != self._fitting:
            check_size(self.index, images)
            self._fitting = images.shape[1:]
        return images

    def _overflows(self) -> bool:
        """Stable Diffusion XL's autoencoder in half precision; its pipeline casts it at the end."""
        forced = getattr(self.autoencoder.config, "force_upcast", False)
        return bool(forced) and self.autoencoder.dtype == torch.float16

    def _float32(self, device: torch.device) -> Any:
        if self._copy is None:
            self._copy = without_offloading(self.autoencoder).to(dtype=torch.float32)
        return self._copy.to(device)


_OFFLOADING = ("_hf_hook", "_diffusers_hook")
"""Where accelerate and diffusers keep the hooks of a module that they move between devices."""


def without_offloading(model: Any) -> Any:
    """A copy of a model alone, all its weights in memory, which nothing moves.

    Hooks of offloading know the pipeline's other models, which a copy of them would take along.
    """
    hooked = {
        name: part
        for name, part in model.named_modules()
        if any(hook in vars(part) for hook in _OFFLOADING)
    }
    left_out = {
        id(value): None
        for part in hooked.values()
        for name in (*_OFFLOADING, "forward", "_old_forward")
        if (value := vars(part).get(name)) is not None
    }
    copied = copy.deepcopy(model, left_out)
    for name in hooked:
        part = copied.get_submodule(name)
        for attribute in (*_OFFLOADING, "forward", "_old_forward"):
            vars(part).pop(attribute, None)
    if any(weight.is_meta for weight in copied.parameters()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        copied.load_state_dict(get_state_dict_offloaded_model(model), assign=True)
    return copied


def check_size(index: ReferenceIndex, images: Tensor) -> None:
    """Refuse images whose features cannot be compared with the index's.

    Embeddings resize images themselves; pixels and latents have a size.
    """
    shape = tuple(images.shape[1:])
    if shape == tuple(index.image_shape):
        return
    with torch.no_grad():
        fits = not isinstance(index.features, PixelFeatures) and (
            index.features(images[:1].detach()).shape[1] == index.vectors.shape[1]
        )
    if not fits:
        raise ValueError(
            f"memfree.guard: the pipeline makes images of {shape}, the index compares "
            f"{index.features.describe()['name']} of {tuple(index.image_shape)}: ask the pipeline "
            "for that height and width, or build the index with an embedding"
        )


def explained_chunks(
    what: str, count: int, chunk_size: int | None, ways: Sequence[str] = ()
) -> AbstractContextManager[None]:
    """Say which option of the guard lowers the memory where it runs out.

    Args:
        what: what is done, as "guiding".
        count: images together.
        chunk_size: images in a piece.
        ways: what lowers the memory besides smaller pieces.
    """
    now = f"now {chunk_size}" if chunk_size else f"now the whole batch of {count}"
    smaller = [f"a smaller chunk_size ({now})"] if min(count, chunk_size or count) > 1 else []
    return explained_memory(f"memfree.guard was {what} {count} samples", [*smaller, *ways])
