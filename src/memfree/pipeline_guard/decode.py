"""Decoding of latents to images, in chunks, for guidance and verdicts."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memfree.models.loading import check_decoder, decode_latents
from memfree.out_of_memory import explained_memory
from memfree.retrieval import PixelFeatures, ReferenceIndex
from memfree.retrieval.features.latents import check_latents


class Decoder:
    """Decodes with the pipeline's autoencoder, estimates with ``small`` if given; differentiable.

    ``chunk_size``: latents decoded at a time (None: all); for gradients each chunk is decoded
    again, which holds one chunk's activations. ``latents``: references in the same latent space.
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
        self.autoencoder: Any = None
        self.follow(autoencoder)

    def follow(self, autoencoder: Any) -> None:
        """Decode with the pipeline's current autoencoder, which may have been replaced."""
        if autoencoder is self.autoencoder:
            return
        if self._given_small is not None:
            check_decoder(self._given_small, autoencoder, "memfree.guard: decoder")
        if self._latents is not None:
            check_latents(self._latents.features, autoencoder, "memfree.guard: latents=")
        self.autoencoder = autoencoder
        self.small = autoencoder if self._given_small is None else self._given_small
        self.draws: dict[str, bool] = {}  # which parts draw; see ``OwnRandomness.if_drawn``
        self._copy: Any = None
        self._fitting: tuple[int, ...] | None = None  # a size that the index can be compared with

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [−1, 1], of the denoiser's latents (B, C, h, w)."""
        autoencoder = self.autoencoder
        # Stable Diffusion XL's autoencoder in half precision; its pipeline casts it at the end.
        overflows = getattr(autoencoder.config, "force_upcast", False)
        if overflows and autoencoder.dtype == torch.float16:
            if self._copy is None:
                self._copy = without_offloading(autoencoder).to(dtype=torch.float32)
            autoencoder = self._copy.to(latents.device)
        return self._decoded(autoencoder, latents)

    def estimate(self, latents: Tensor) -> Tensor:
        """Decode clean estimates during sampling, with ``small`` if given."""
        if self.small is self.autoencoder:
            return self(latents)
        return self._decoded(self.small, latents)

    def finished(self, latents: Tensor) -> Tensor:
        """Images in [−1, 1], clamped as a pipeline returns them."""
        return self(latents).clamp(-1, 1)

    def explained(self, what: str, count: int) -> AbstractContextManager[None]:
        """Where memory runs out, name the guard's options that lower it."""
        size = self.chunk_size
        now = f"now {size}" if size else f"now the whole batch of {count}"
        ways = [f"a smaller chunk_size ({now})"] if min(count, size or count) > 1 else []
        if what == "guiding" and self.small is self.autoencoder:
            ways.append("a decoder such as diffusers' AutoencoderTiny")
        return explained_memory(f"memfree.guard was {what} {count} samples", ways)

    def check_size(self, images: Tensor) -> None:
        """Refuse images whose features (pixels, latents) cannot be compared with the index."""
        index, shape = self.index, tuple(images.shape[1:])
        if shape in (tuple(index.image_shape), self._fitting):
            return
        with torch.no_grad():
            fits = not isinstance(index.features, PixelFeatures) and (
                index.features(images[:1].detach()).shape[1] == index.vectors.shape[1]
            )
        if not fits:
            raise ValueError(
                f"memfree.guard: the pipeline makes images of {shape}, the index compares "
                f"{index.features.describe()['name']} of {tuple(index.image_shape)}: ask the "
                "pipeline for that height and width, or build the index with an embedding"
            )
        self._fitting = shape  # the features cost an embedding

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
        self.check_size(images)
        return images


_OFFLOADING = ("_hf_hook", "_diffusers_hook")  # of accelerate and diffusers
_REPLACED = (*_OFFLOADING, "forward", "_old_forward")


def without_offloading(model: Any) -> Any:
    """A copy of a model, all in memory; offloading hooks would copy the pipeline's other models."""
    modules = model.named_modules()
    hooked = {
        name: vars(part) for name, part in modules if any(h in vars(part) for h in _OFFLOADING)
    }
    left_out = {
        id(own[attribute]): None
        for own in hooked.values()
        for attribute in _REPLACED
        if own.get(attribute) is not None
    }
    copied = copy.deepcopy(model, left_out)
    for name in hooked:
        for attribute in _REPLACED:
            vars(copied.get_submodule(name)).pop(attribute, None)
    if any(weight.is_meta for weight in copied.parameters()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        copied.load_state_dict(get_state_dict_offloaded_model(model), assign=True)
    return copied
