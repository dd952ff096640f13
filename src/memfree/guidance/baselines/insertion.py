"""Words put at random places of a prompt, as RT, RNA and CWR do (Somepalli et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
