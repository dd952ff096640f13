"""Options of the baselines; no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

AtLeastOne = restricted_number_type("AtLeastOne", float, (">=", 1))


@dataclass
class LowerGuidanceOptions:
    """Lower classifier-free guidance."""

    guidance_scale: AtLeastOne = 2.0  # type: ignore[valid-type]
    """Largest s_0 used; ours, without a source. 1, the least, is the conditional model alone:
    diffusers reads anything below as no guidance at all."""


@dataclass
class Insertion:
    """Words inserted into the prompt (Somepalli et al., 2023)."""

    count: NonNegativeInt = 4
    """Insertions per prompt; 4 in the authors' programs (1 to 8 in papers), 0 changes nothing."""


@dataclass
class EmbeddingNoiseOptions:
    """Gaussian noise on the prompt's embedding (Somepalli et al., 2023)."""

    strength: NonNegativeFloat = 0.1
    """λ, in units of the embedding's entries; 0.1 in the paper, 0 changes nothing."""


@dataclass
class PromptEmbeddingOptions:
    """Optimised prompt embedding (Wen et al., 2024)."""

    target: NonNegativeFloat = 3.0
    """l: a sample stops where ‖ε_c − ε_∅‖ ≤ l. Tuned for Stable Diffusion 1.4 (papers sweep about 1
    to 7); a large one changes nothing."""
    learning_rate: PositiveFloat = 0.05
    """Of AdamW; 0.05 in the authors' program."""
    iterations: NonNegativeInt = 10
    """Most steps of AdamW; 10 in the authors' program."""
    per_element: bool = True
    """Multiply l by √(elements of a latent / 16384): unchanged at 4×64×64, the same root mean
    square elsewhere. False: l as it is."""


@dataclass
class AttentionRescalingOptions:
    """Rescaled cross-attention (Ren et al., 2024)."""

    scale: PositiveFloat = 1.25
    """c, which multiplies the logits of the begin-of-text token; 1.25 in the authors' command, 1.1
    to 1.35 in papers, 1 leaves them."""
    mask_padding: bool = True
    """Mask the tokens after the prompt's end of text."""
    mask_end: bool = False
    """Mask the end of text too; the authors' command does not."""


@dataclass
class OppositeGuidanceOptions:
    """Opposite guidance before a transition point (Jain et al., 2025)."""

    transition: Literal["static", "dynamic"] = "static"
    """static: at transition_time; dynamic: at each sample's first local minimum of ‖ε_c − ε_∅‖."""
    transition_time: ClosedUnitInterval = 0.65
    """Static: guidance starts at this share of the training timesteps, 1 being noise. Authors: 0.65
    for opposite guidance, 0.5 for no guidance; 1 changes nothing."""
    scale_before: float = -2.0
    """s_0 before the transition. Authors: static −2 (opposite) or 0 (none); dynamic 1 (the
    conditional prediction alone) or −7.5 (opposite)."""


@dataclass
class PromptReanchoringOptions:
    """Prompt re-anchoring and semantic search (Chen et al., 2025)."""

    alternative: Literal["search", "optimized"] = "search"
    """y_mod: the nearest given prompt that is not memorized (SS), or the prompt's embedding
    optimised by Wen's method."""
    trigger: NonNegativeFloat = 1.0
    """Mitigate a sample if ‖ε_c − ε_∅‖ is above this at the first step, and seek y_mod below it; 1
    in the authors' README."""
    target: PositiveFloat = 3.0
    """l: below it y_mod alone is guided to, above it re-anchoring is used; 3 in their README."""
    threshold: PositiveFloat = 5.0
    """thr: re-anchoring has full strength from here, s_pr = s_0; 5 in their README."""
    candidates: PositiveInt = 25
    """Search: how many nearest prompts are tried; 25 in the authors' program."""
    per_element: bool = True
    """Multiply trigger, target and threshold by √(elements of a latent / 16384): unchanged at
    4×64×64, the same root mean square elsewhere. False: as they are."""


@dataclass
class SharpnessAwareOptions:
    """Optimised initial noise (Jeon et al., 2025)."""

    threshold: NonNegativeFloat = 8.2
    """l_thres: take the first candidate whose loss is at most this. Tuned for Stable Diffusion 1.4,
    where 0.05·‖x_T‖ alone is about 6.4; a large one changes nothing."""
    gaussianity: NonNegativeFloat = 0.05
    """α, the weight of ‖x_T‖; 0.05 in the authors' program for Stable Diffusion 1, 0.01 for 2."""
    learning_rate: PositiveFloat = 0.05
    """Of Adam; 0.05 in the authors' program."""
    iterations: PositiveInt = 10
    """Most evaluations of the loss; 10 in the authors' program."""
    candidates: PositiveInt = 8
    """Noises optimised together per sample, its own x_T first; 8 in the authors' program."""
    per_element: bool = True
    """Multiply the threshold and the length of the difference step by √(elements / 16384):
    unchanged at 4×64×64, the same root mean square elsewhere. False: as they are."""
