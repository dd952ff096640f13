"""RT: random tokens inserted in the prompt (Somepalli et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from memfree.guidance.baselines.insertion import draw_below, with_words
from memfree.guidance.baselines.options import Insertion
from memfree.guidance.mitigation import Mitigation


class RandomTokens(Mitigation):
    """RT: insert random tokens of the tokenizer's vocabulary at random places of the prompt.

    Source: Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models", NeurIPS
    2023, arXiv 2305.20086, inference-time mitigation; ``rand_word_add`` of the authors' program
    draws token numbers below 49400 and decodes them.

    Args:
        words: the vocabulary to draw from, one text a token, or what returns it on first use
            (``TextTools.words``).
        options: how many tokens are inserted.

    Raises:
        ValueError: the vocabulary is empty.
    """

    def __init__(
        self,
        words: Sequence[str] | Callable[[], Sequence[str]],
        options: Insertion = Insertion(),  # noqa: B008 - read only
    ) -> None:
        self._words = words
        self.options = options

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Insert ``count`` tokens in every prompt."""
        if self.options.count == 0:
            return list(prompts)
        words = self._words() if callable(self._words) else self._words
        if not words:
            raise ValueError("random tokens (rt) need a vocabulary that is not empty")

        def word(generator: torch.Generator) -> str:
            return words[draw_below(len(words), generator)]

        return [
            with_words(prompt, self.options.count, word, generator)
            for prompt, generator in zip(prompts, generators, strict=True)
        ]
