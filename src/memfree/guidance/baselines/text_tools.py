"""What mitigations need of a model's text side: its vocabulary, lengths, and other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


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
