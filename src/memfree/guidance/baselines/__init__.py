"""The field's mitigations and one detector, each with its source and its defaults."""

from memfree.guidance.baselines.attention_rescaling import (
    AttentionRescaling,
    AttentionRescalingOptions,
)
from memfree.guidance.baselines.embedding_noise import EmbeddingNoise, EmbeddingNoiseOptions
from memfree.guidance.baselines.guided import Guided
from memfree.guidance.baselines.insertion import Insertion
from memfree.guidance.baselines.lower_guidance import LowerGuidance, LowerGuidanceOptions
from memfree.guidance.baselines.opposite_guidance import OppositeGuidance, OppositeGuidanceOptions
from memfree.guidance.baselines.prompt_embedding import (
    PromptEmbeddingOptimization,
    PromptEmbeddingOptions,
)
from memfree.guidance.baselines.random_numbers import RandomNumbers
from memfree.guidance.baselines.random_tokens import RandomTokens
from memfree.guidance.baselines.reanchoring import PromptReanchoring, PromptReanchoringOptions
from memfree.guidance.baselines.reject_and_resample import RejectAndResample
from memfree.guidance.baselines.repeated_words import RepeatedWords
from memfree.guidance.baselines.sequential import Sequential
from memfree.guidance.baselines.sharpness_aware_noise import (
    SharpnessAwareInitialization,
    SharpnessAwareOptions,
)
from memfree.guidance.baselines.text_tools import TextTools
from memfree.guidance.baselines.wen_norm import WenNorm, wen_norm

__all__ = [
    "AttentionRescaling",
    "AttentionRescalingOptions",
    "EmbeddingNoise",
    "EmbeddingNoiseOptions",
    "Guided",
    "Insertion",
    "LowerGuidance",
    "LowerGuidanceOptions",
    "OppositeGuidance",
    "OppositeGuidanceOptions",
    "PromptEmbeddingOptimization",
    "PromptEmbeddingOptions",
    "PromptReanchoring",
    "PromptReanchoringOptions",
    "RandomNumbers",
    "RandomTokens",
    "RejectAndResample",
    "RepeatedWords",
    "Sequential",
    "SharpnessAwareInitialization",
    "SharpnessAwareOptions",
    "TextTools",
    "WenNorm",
    "wen_norm",
]
