"""RNA: random numbers added to the prompt (Somepalli et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memfree.guidance.baselines.insertion import draw_below, with_words
from memfree.guidance.baselines.options import Insertion
from memfree.guidance.mitigation import Mitigation

NUMBERS = 100_000
"""Numbers are drawn from 0 to 99999, as in the authors' program."""


class RandomNumbers(Mitigation):
    """RNA: insert random numbers at random places of the prompt.

    Source: Somepalli et al., arXiv 2305.20086, inference-time mitigation; ``rand_numb_add`` of the
    authors' program.

    Args:
        options: how many numbers are inserted.
    """

    def __init__(self, options: Insertion = Insertion()) -> None:  # noqa: B008 - read only
        self.options = options

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Insert ``count`` numbers in every prompt."""
        return [
            with_words(prompt, self.options.count, _number, generator)
            for prompt, generator in zip(prompts, generators, strict=True)
        ]


def _number(generator: torch.Generator) -> str:
    return str(draw_below(NUMBERS, generator))
