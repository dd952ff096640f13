"""Prompt perturbation (Somepalli et al., 2023): random tokens, random numbers, repeated words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from memfree.guidance.baselines.options import Insertion
from memfree.guidance.mitigation import Mitigation

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def draw_below(bound: int, generator: torch.Generator) -> int:
    """A whole number in [0, bound), all alike."""
    return int(torch.randint(bound, (), generator=generator))


def inserted(prompt: str, word: str, generator: torch.Generator) -> str:
    """The prompt with ``word`` before, between or after its words, every place alike."""
    words = prompt.split(" ")
    words.insert(draw_below(len(words) + 1, generator), word)
    return " ".join(words)


def with_words(
    prompt: str,
    count: int,
    word: Callable[[torch.Generator], str],
    generator: torch.Generator,
) -> str:
    """The prompt with ``count`` words inserted one after another.

    Args:
        prompt: of one sample.
        count: insertions.
        word: draws a word.
        generator: of the sample; a word is drawn first, then its place.
    """
    for _ in range(count):
        prompt = inserted(prompt, word(generator), generator)
    return prompt


class TextTools:
    """The tokenizer of a pipeline, as RT, attention rescaling and PRSS use it.

    Args:
        tokenizer: a Hugging Face tokenizer (the first one of SDXL).
        prompts: prompts among which PRSS searches alternatives, such as training captions.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.prompts = list(prompts)

    @classmethod
    def of(cls, tokenizer: Any, index: ReferenceIndex | None) -> TextTools:
        """The tokenizer, and the captions of the index, where it has any, for prompts."""
        captions = None if index is None else index.captions
        return cls(tokenizer, sorted(set(captions or ())))

    @cached_property
    def _words(self) -> list[str]:
        special = set(self.tokenizer.all_special_ids)
        numbers = [one for one in range(len(self.tokenizer)) if one not in special]
        return list(self.tokenizer.batch_decode([[one] for one in numbers]))

    def words(self) -> list[str]:
        """The text of every token of the vocabulary but the special ones."""
        return self._words

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with its begin and end of text, cut at the model's length."""
        encoded = self.tokenizer(
            list(prompts), truncation=True, max_length=self.tokenizer.model_max_length
        )
        return [len(one) for one in encoded["input_ids"]]


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
