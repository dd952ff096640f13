"""Which rows of a denoiser's text input are which prompts, by equality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COMPARED = 512
"""Entries by which rows are told apart before they are compared as a whole."""


class KnownPrompts:
    """The embeddings of a batch's prompts with their lengths, and of its unconditional prompts."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        self._seen: Tensor | None = None
        self._found: Tensor | None = None

    def learn(self, embeddings: Tensor, lengths: Sequence[int], unconditional: Tensor) -> None:
        """Replace what is known.

        Args:
            embeddings: (B, L, D) of the prompts.
            lengths: tokens of each, (B,).
            unconditional: (B, L, D).
        """
        self._known = (
            embeddings.detach(),
            torch.tensor(list(lengths), dtype=torch.int64, device=embeddings.device),
            unconditional.detach(),
        )
        self._seen = self._found = None

    def lengths_of(self, embeddings: Tensor) -> Tensor:
        """The prompt length of each row of (N, L, D), (N,) int64; 0 where it is no known prompt.

        A row that equals an unconditional embedding counts as no prompt.
        """
        # All layers of a network get the same tensor: it is looked up once.
        if self._seen is not embeddings or self._found is None:
            self._seen, self._found = embeddings, self._look_up(embeddings)
        return self._found

    def _look_up(self, embeddings: Tensor) -> Tensor:
        nothing = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
        if self._known is None:
            return nothing
        known, lengths, unconditional = (one.to(embeddings.device) for one in self._known)
        place, is_prompt = _equal_row(embeddings, known.to(embeddings.dtype))
        _, is_unconditional = _equal_row(embeddings, unconditional.to(embeddings.dtype))
        return torch.where(is_prompt & ~is_unconditional, lengths[place], nothing)


def _equal_row(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of (N, L, D), which of the known rows it may equal (N,), and if it does (N,)."""
    if rows.shape[1:] != known.shape[1:]:
        count = len(rows)
        return (
            torch.zeros(count, dtype=torch.int64, device=rows.device),
            torch.zeros(count, dtype=torch.bool, device=rows.device),
        )
    first, second = rows.detach().flatten(1), known.flatten(1)
    stride = max(1, first.shape[1] // COMPARED)
    alike = (first[:, None, ::stride] == second[None, :, ::stride]).all(dim=2)
    place = alike.int().argmax(dim=1)
    return place, (first == second[place]).all(dim=1)
