from .attention_rescaling import (
    AttentionRescaling as AttentionRescaling,
)
from .embedding_noise import (
    EmbeddingNoise as EmbeddingNoise,
)
from .guided import Guided as Guided
from .lower_guidance import (
    LowerGuidance as LowerGuidance,
)
from .opposite_guidance import (
    OppositeGuidance as OppositeGuidance,
)
from .options import AttentionRescalingOptions as AttentionRescalingOptions
from .options import EmbeddingNoiseOptions as EmbeddingNoiseOptions
from .options import Insertion as Insertion
from .options import LowerGuidanceOptions as LowerGuidanceOptions
from .options import OppositeGuidanceOptions as OppositeGuidanceOptions
from .options import PromptEmbeddingOptions as PromptEmbeddingOptions
from .options import PromptReanchoringOptions as PromptReanchoringOptions
from .options import SharpnessAwareOptions as SharpnessAwareOptions
from .prompt_embedding import (
    PromptEmbeddingOptimization as PromptEmbeddingOptimization,
)
from .random_numbers import RandomNumbers as RandomNumbers
from .random_tokens import RandomTokens as RandomTokens
from .reanchoring import (
    PromptReanchoring as PromptReanchoring,
)
from .reject_and_resample import RejectAndResample as RejectAndResample
from .repeated_words import RepeatedWords as RepeatedWords
from .sequential import Sequential as Sequential
from .sharpness_aware_noise import (
    SharpnessAwareInitialization as SharpnessAwareInitialization,
)
from .text_tools import TextTools as TextTools
from .wen_norm import WenNorm as WenNorm
from .wen_norm import wen_norm as wen_norm
