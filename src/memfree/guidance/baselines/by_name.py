"""The field's baseline that settings name, built with its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memfree.guidance.baselines.attention_rescaling import AttentionRescaling
from memfree.guidance.baselines.embedding_noise import EmbeddingNoise
from memfree.guidance.baselines.lower_guidance import LowerGuidance
from memfree.guidance.baselines.opposite_guidance import OppositeGuidance
from memfree.guidance.baselines.prompt_embedding import PromptEmbeddingOptimization
from memfree.guidance.baselines.random_numbers import RandomNumbers
from memfree.guidance.baselines.random_tokens import RandomTokens
from memfree.guidance.baselines.reanchoring import PromptReanchoring
from memfree.guidance.baselines.repeated_words import RepeatedWords
from memfree.guidance.baselines.sharpness_aware_noise import SharpnessAwareInitialization
from memfree.guidance.baselines.text_tools import TextTools
from memfree.guidance.mitigation import Mitigation

if TYPE_CHECKING:
    from memfree.guidance.settings import GuidanceSettings


def baseline(settings: GuidanceSettings, text: TextTools | None) -> list[Mitigation]:
    """The baseline that ``settings.mitigation`` names; empty for mitigations that are none.

    Args:
        settings: its name and the options of all.
        text: the model's tokenizer, and prompts for PRSS to search.

    Raises:
        ValueError: the baseline needs the text side, and it is missing, or an option is wrong.
    """
    name = settings.mitigation
    searches = name == "prss" and settings.prss.alternative == "search"
    if text is None and (name in ("rt", "ren") or searches):
        raise ValueError(f"--guidance.mitigation {name} needs the model's tokenizer")
    if name == "rt":
        assert text is not None
        return [RandomTokens(text.words, settings.rt)]
    if name == "ren":
        assert text is not None
        return [AttentionRescaling(text.count_tokens, settings.ren)]
    if name == "prss":
        return [PromptReanchoring([] if text is None else text.prompts, settings.prss)]
    plain: dict[str, Callable[[], Mitigation]] = {
        "lower_guidance": lambda: LowerGuidance(settings.lower_guidance),
        "rna": lambda: RandomNumbers(settings.rna),
        "cwr": lambda: RepeatedWords(settings.cwr),
        "gni": lambda: EmbeddingNoise(settings.gni),
        "wen": lambda: PromptEmbeddingOptimization(settings.wen),
        "jain": lambda: OppositeGuidance(settings.jain),
        "sail": lambda: SharpnessAwareInitialization(settings.sail),
    }
    return [plain[name]()] if name in plain else []
