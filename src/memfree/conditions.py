"""Conditions of a sample: class labels, or encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextConditions:
    """Encoded prompts of a batch, as a text-to-image denoiser takes them; indexed by rows."""

    embeddings: Tensor  # (B, L, D): one vector a token
    pooled: Tensor | None = None  # (B, P): one vector a prompt, for SDXL and SD3
    mask: Tensor | None = None  # (B, L): which tokens count, for PixArt

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Tensor | slice) -> TextConditions:
        return self._each(lambda value: value[rows])

    def shapes(self) -> list[torch.Size | None]:
        """Shape of each part; conditions of equal shapes fit into one batch."""
        parts = (self.embeddings, self.pooled, self.mask)
        return [None if part is None else part.shape for part in parts]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextConditions:
        """The same on another device, and with another floating type if ``dtype`` is given."""
        return self._each(
            lambda value: value.to(device, dtype if value.is_floating_point() else None)
        )

    def expand(self, count: int) -> TextConditions:
        """One encoded prompt (a batch of 1) for ``count`` samples, without copies."""
        return self._each(lambda value: value.expand(count, *value.shape[1:]))

    def sentence(self) -> Tensor:
        """(B, D) float32 of length 1: the mean of the token vectors, or of those in the mask."""
        tokens = self.embeddings.float()
        if self.mask is not None:
            tokens = tokens * self.mask.to(tokens)[..., None]  # its length is normalised away
        return torch.nn.functional.normalize(tokens.mean(dim=1), dim=1)

    @classmethod
    def cat(cls, parts: Sequence[TextConditions]) -> TextConditions:
        """Concatenate batches."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        mask = [part.mask for part in parts if part.mask is not None]
        return cls(
            torch.cat([part.embeddings for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(mask) if mask else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextConditions:
        return TextConditions(
            change(self.embeddings),
            None if self.pooled is None else change(self.pooled),
            None if self.mask is None else change(self.mask),
        )


Conditions = Tensor | TextConditions  # labels (B,) int64, or encoded prompts; indexed by rows
Encode = Callable[[Sequence[str]], TextConditions]  # texts → conditions, one for each

ENCODED_AT_ONCE = 64


def sentences(encode: Encode, texts: Sequence[str]) -> Tensor:
    """Sentence vectors (len(texts), D) of one or more texts, encoded in chunks."""
    starts = range(0, len(texts), ENCODED_AT_ONCE)
    return torch.cat([encode(texts[i : i + ENCODED_AT_ONCE]).sentence() for i in starts])


SAME = 1 - 1e-6
"""Cosine of sentence vectors above which two texts count as the same. In another batch, a text
stays within 3e-7 of itself; of 1361 captions of emoji, the nearest two are 2e-6 apart."""


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines (B, C) float32 of sentence vectors (B, D) and (C, D)."""
    # Neither autocast nor TF32 rounds float64; MPS has neither float64 nor TF32.
    exact = torch.float32 if first.device.type == "mps" else torch.float64
    with torch.autocast(first.device.type, enabled=False):
        return (first.to(exact) @ second.to(exact).T).float()


def differ(first: Conditions, second: Conditions) -> Tensor:
    """(B,) bool: which rows have different conditions."""
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        return first != second
    assert isinstance(second, TextConditions)
    return (first.embeddings != second.embeddings).flatten(1).any(dim=1)
