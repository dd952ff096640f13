"""What frozen encoders make of images and captions, kept in memory between epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.models.latents import posterior
from memfree.models.text_pipeline import encode


class LatentCache:
    """Mean and standard deviation of each image's latent, by the row of the image; on the CPU."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        return self

    def __call__(self, vae: Any, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``posterior`` of images (B, 3, H, W), the autoencoder asked for new rows (B,) only.

        Raises:
            ValueError: foreign shards, whose records have no rows.
        """
        numbers = rows.tolist()
        if min(numbers) < 0:
            raise ValueError(
                "--model.finetune.cache needs a dataset folder: shards without a manifest do not "
                "say which image a record is"
            )
        new = [i for i, row in enumerate(numbers) if row not in self._known]
        if new:
            mean, std = (part.cpu() for part in posterior(vae, images[new]))
            for i, one, two in zip(new, mean, std, strict=True):
                self._known[numbers[i]] = one, two
        found = [self._known[row] for row in numbers]
        mean, std = (torch.stack(parts) for parts in zip(*found, strict=True))
        return mean.to(images.device), std.to(images.device)


class EmbeddingCache:
    """Encoded captions by their text, on the device that encodes."""

    def __init__(self) -> None:
        self._known: dict[str, TextConditions] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingCache:
        return self

    def __call__(self, pipe: Any, captions: Sequence[str]) -> TextConditions:
        """``encode`` of captions, the text encoder asked for new ones only."""
        new = [text for text in dict.fromkeys(captions) if text not in self._known]
        if new:
            encoded = encode(pipe, new)
            for i, text in enumerate(new):
                self._known[text] = encoded[slice(i, i + 1)]
        return TextConditions.cat([self._known[text] for text in captions])
