"""CWR: words of the prompt repeated in it (Somepalli et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memfree.guidance.baselines.insertion import draw_below, with_words
from memfree.guidance.baselines.options import Insertion
from memfree.guidance.mitigation import Mitigation


class RepeatedWords(Mitigation):
    """CWR, caption word repetition: insert words of the prompt again, at random places.

    Source: Somepalli et al., arXiv 2305.20086, inference-time mitigation; ``rand_word_repeat`` of
    the authors' program. Words are those between spaces of the prompt as it was given.

    Args:
        options: how many words are repeated.
    """

    def __init__(self, options: Insertion = Insertion()) -> None:  # noqa: B008 - read only
        self.options = options

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Repeat ``count`` words in every prompt; an empty prompt stays empty."""
        return [
            self._repeated(prompt, generator)
            for prompt, generator in zip(prompts, generators, strict=True)
        ]

    def _repeated(self, prompt: str, generator: torch.Generator) -> str:
        words, count = prompt.split(" "), self.options.count if prompt else 0
        return with_words(
            prompt, count, lambda source: words[draw_below(len(words), source)], generator
        )
