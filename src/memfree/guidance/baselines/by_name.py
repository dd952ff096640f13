"""Baselines of the field by name, built from their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memfree.guidance.baselines.attention_rescaling import AttentionRescaling
from memfree.guidance.baselines.opposite_guidance import LowerGuidance, OppositeGuidance
from memfree.guidance.baselines.prompt_embedding import EmbeddingNoise, PromptEmbeddingOptimization
from memfree.guidance.baselines.prompt_reanchoring import PromptReanchoring
from memfree.guidance.baselines.prompt_words import (
    RandomNumbers,
    RandomTokens,
    RepeatedWords,
    TextTools,
)
from memfree.guidance.baselines.sharpness_aware_noise import SharpnessAwareInitialization
from memfree.guidance.mitigation import Mitigation


def baseline(name: str, options: Any, text: TextTools | None) -> list[Mitigation]:
    """The baseline of this name; empty for mitigations that are none.

    Args:
        name: of the mitigation.
        options: of the baseline; None for mitigations that are none.
        text: the model's tokenizer, and prompts for PRSS to search.

    Raises:
        ValueError: the baseline needs the text side, and it is missing, or an option is wrong.
    """
    searches = name == "prss" and options.alternative == "search"
    if text is None and (name in ("rt", "ren") or searches):
        raise ValueError(f"--guidance.mitigation {name} needs the model's tokenizer")
    if name == "rt":
        assert text is not None
        return [RandomTokens(text.words, options)]
    if name == "ren":
        assert text is not None
        return [AttentionRescaling(text.count_tokens, options)]
    if name == "prss":
        return [PromptReanchoring([] if text is None else text.prompts, options)]
    plain: dict[str, Callable[[], Mitigation]] = {
        "lower_guidance": lambda: LowerGuidance(options),
        "rna": lambda: RandomNumbers(options),
        "cwr": lambda: RepeatedWords(options),
        "gni": lambda: EmbeddingNoise(options),
        "wen": lambda: PromptEmbeddingOptimization(options),
        "jain": lambda: OppositeGuidance(options),
        "sail": lambda: SharpnessAwareInitialization(options),
    }
    return [plain[name]()] if name in plain else []
