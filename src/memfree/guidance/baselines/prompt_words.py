"""Prompt perturbation (Somepalli et al., 2023): random tokens, random numbers, repeated words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from memfree.guidance.baselines.options import Insertion
from memfree.guidance.mitigation import Mitigation

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def _draw_below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


class TextTools:
    """A Hugging Face tokenizer (SDXL: the first one) and the ``prompts`` that PRSS searches."""

    def __init__(self, tokenizer: Any, prompts: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.prompts = list(prompts)

    @classmethod
    def of(cls, tokenizer: Any, index: ReferenceIndex | None) -> TextTools:
        """The tokenizer, with the captions of the index as prompts."""
        captions = None if index is None else index.captions
        return cls(tokenizer, sorted(set(captions or ())))

    @cached_property
    def _words(self) -> list[str]:
        special = set(self.tokenizer.all_special_ids)
        tokens = [[token] for token in range(len(self.tokenizer)) if token not in special]
        return list(self.tokenizer.batch_decode(tokens))

    def words(self) -> list[str]:
        """The text of every token of the vocabulary but the special ones."""
        return self._words

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with its begin and end of text, cut at the model's length."""
        length = self.tokenizer.model_max_length
        encoded = self.tokenizer(list(prompts), truncation=True, max_length=length)
        return [len(tokens) for tokens in encoded["input_ids"]]


@dataclass(eq=False)
class _InsertedWords(Mitigation, ABC):
    options: Insertion = field(default_factory=Insertion)

    @abstractmethod
    def word(self, prompt: str, generator: torch.Generator) -> str: ...

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        return [
            self._inserted(prompt, generator)
            for prompt, generator in zip(prompts, generators, strict=True)
        ]

    def _inserted(self, prompt: str, generator: torch.Generator) -> str:
        changed = prompt
        for _ in range(self.options.count):
            word = self.word(prompt, generator)  # first the word, then its place
            words = changed.split(" ")
            words.insert(_draw_below(len(words) + 1, generator), word)
            changed = " ".join(words)
        return changed


class RandomNumbers(_InsertedWords):
    """RNA: insert numbers from 0 to 99999 (arXiv 2305.20086: ``rand_numb_add``)."""

    def word(self, prompt: str, generator: torch.Generator) -> str:
        """A number."""
        return str(_draw_below(100_000, generator))


class RandomTokens(_InsertedWords):
    """RT: insert random tokens of the tokenizer's vocabulary at random places of the prompt.

    Source: Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models", NeurIPS
    2023, arXiv 2305.20086; ``rand_word_add`` of their program draws token numbers below 49400.
    ``words`` has a text per token, or returns them on first use (``TextTools.words``).
    """

    def __init__(
        self,
        words: Sequence[str] | Callable[[], Sequence[str]],
        options: Insertion = Insertion(),  # noqa: B008 - read only
    ) -> None:
        super().__init__(options)
        self._words = words

    @cached_property
    def _vocabulary(self) -> Sequence[str]:
        return self._words() if callable(self._words) else self._words

    def word(self, prompt: str, generator: torch.Generator) -> str:
        """A token."""
        if not self._vocabulary:
            raise ValueError("random tokens (rt) need a vocabulary that is not empty")
        return self._vocabulary[_draw_below(len(self._vocabulary), generator)]


class RepeatedWords(_InsertedWords):
    """CWR: insert the prompt's words again (arXiv 2305.20086: ``rand_word_repeat``)."""

    def word(self, prompt: str, generator: torch.Generator) -> str:
        """A word of the original prompt."""
        words = prompt.split(" ")
        return words[_draw_below(len(words), generator)]

    def _inserted(self, prompt: str, generator: torch.Generator) -> str:
        return super()._inserted(prompt, generator) if prompt else prompt
