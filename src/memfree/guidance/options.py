"""Mitigations by name: their options and classes. No torch: ``--help`` is made of this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from memfree.data.split import DEFAULT_RATE
from memfree.guidance.baselines import options as baselines
from memfree.retrieval.options import CaptionPolicy

Through = Literal["clean_estimate", "denoiser"]  # ∇σ through x̂_0 with ε̂ constant, or both
CAPTION_NEIGHBOURS = 10  # k of ``most_common``; 1000 in the authors' code, for two billion images
CAPTION_RECORDS = 5  # m of ``most_common``; 20 in the authors' code


@dataclass
class MitigationOptions:
    """No mitigation; with an index, σ_t is recorded."""

    false_positive_rate: float = DEFAULT_RATE
    """λ_t ends (t = 0) at the threshold that this share of held-out real images exceeds."""
    schedule: Literal["rising", "constant"] = "rising"
    """λ_t: rising as t falls (eq. 19), or constant at its end point (the paper's ablation)."""
    start_ratio: PositiveFloat | None = None
    """Where λ_t starts, relative to its end point: times start_ratio (pixels; None: 1.4, paper:
    1.3) or 1/start_ratio (embeddings; None: 1.16, authors' code: 1.33)."""
    rate: PositiveFloat = 0.025
    """c of eq. 19, per step of a 250-step grid."""
    cadence: PositiveInt = 1
    """Search the nearest images only every n steps until cadence_always_below: cheaper, but
    guidance may begin up to n − 1 steps late."""
    cadence_always_below: ClosedUnitInterval = 0.3
    """Search at every step from this time on (1 is noise, 0 the image), where λ_t has risen."""
    wen_norm_steps: NonNegativeInt = 0
    """Record Wen's norm, the mean of ‖ε_c − ε_∅‖ over this many first steps, as wen_norm in the
    trace; 0: off. Text-to-image models with a guidance scale above 1."""


@dataclass
class RejectOptions(MitigationOptions):
    """Draw again while the sample is a copy."""

    budget: PositiveInt = 10
    """Most draws of a sample; the last one is kept in any case."""


@dataclass
class _CaptionKernel(MitigationOptions):
    caption_bandwidth: NonNegativeFloat = 0.3
    """Weight of records with other captions than the prompt, exp(−(1 − cosine)/caption_bandwidth),
    in multiplicity guidance and AMG's repeated images; 0: equal captions alone."""


@dataclass
class MultiplicityOptions(_CaptionKernel):
    """Multiplicity guidance (ours)."""

    strength: NonNegativeFloat = 1.5
    """κ of multiplicity guidance."""
    damp_captions: bool = True
    """Text-to-image: captions of repeated images count as if deduplicated; m records: 1/m."""


@dataclass
class AMGOptions(_CaptionKernel):
    """Anti-Memorization Guidance (Chen et al., 2024)."""

    gated: bool = True
    """False opens the gate to every sample at every step (the paper's ablation)."""
    gate_margin: NonNegativeFloat | None = None
    """The gate opens this far below λ_t, in units of σ. None: 0.1, embeddings 0.05."""
    margin_per_doubling: NonNegativeFloat | None = None
    """Adds this to the margin per doubling of the nearest image's training records that fit the
    prompt (caption_bandwidth). None: 0, embeddings 0.05."""
    c1: NonNegativeFloat = 5.0
    """Despecification (eq. 13); 0 switches it off."""
    c2: NonNegativeFloat = 5.0
    """Caption or label deduplication (eq. 15); 0 switches it off."""
    caption_policy: CaptionPolicy = "nearest"
    """Caption that c2 steers away from: the nearest image's (nearest, the paper) or the most common
    among the nearest (most_common, the authors' code)."""
    caption_neighbours: PositiveInt = CAPTION_NEIGHBOURS
    """Nearest images that most_common counts, near copies as one; the authors' code counts 1000 of
    the billions of LAION."""
    caption_records: NonNegativeInt = CAPTION_RECORDS
    """Take the most common caption if more training records than this have it, else the nearest
    image's; 20 in the authors' code."""
    c3: NonNegativeFloat = 300.0
    """Dissimilarity guidance (eq. 17); 0 switches it off."""
    max_displacement: NonNegativeFloat | None = None
    """The most that G_sim moves x̂_0 per step, as root mean square; 0: no limit. None: 1,
    embeddings 0.6 after multiplicity guidance and 2 without."""
    least_scale: ClosedUnitInterval | None = None
    """What c1 and c2 leave of the guidance scale near a repeated image. 1 (paper): the conditional
    prediction; 0: the unconditional, for prompts of one memorized image. None: 1, embeddings 0."""
    latched: bool | None = None
    """Keep c1 and c2 to the end once a repeated image opened a sample's gate, so that its prompt
    does not call it back. None: false, embeddings true."""
    final_correction: bool = True
    """Move what is still too near at the last step past λ_0, by a quarter of gate_margin."""
    gradient: Through = "clean_estimate"
    """Take ∇σ through x̂_0 alone, or through the denoiser as well (slower)."""


@dataclass
class BothOptions(AMGOptions, MultiplicityOptions):
    """Multiplicity guidance, then AMG."""


class Entry(NamedTuple):
    """One mitigation."""

    options: type  # Its dataclass of options
    baseline: str = ""  # A class of ``memfree.guidance.baselines``, called with its options
    text: str = ""  # Attribute of ``TextTools`` that the class takes before the options
    name: str = ""  # The summary, where options are shared

    @property
    def summary(self) -> str:
        """One line for ``--help``."""
        return self.name or (self.options.__doc__ or "").split("\n")[0].removesuffix(".")


MITIGATIONS = {
    "none": Entry(MitigationOptions),
    "amg": Entry(AMGOptions),
    "multiplicity": Entry(MultiplicityOptions),
    "both": Entry(BothOptions),
    "reject": Entry(RejectOptions),
    "lower_guidance": Entry(baselines.LowerGuidanceOptions, "LowerGuidance"),
    "rt": Entry(baselines.Insertion, "RandomTokens", "words", "Random tokens in the prompt"),
    "rna": Entry(baselines.Insertion, "RandomNumbers", name="Random numbers in the prompt"),
    "cwr": Entry(baselines.Insertion, "RepeatedWords", name="Repeated words of the prompt"),
    "gni": Entry(baselines.EmbeddingNoiseOptions, "EmbeddingNoise"),
    "wen": Entry(baselines.PromptEmbeddingOptions, "PromptEmbeddingOptimization"),
    "ren": Entry(baselines.AttentionRescalingOptions, "AttentionRescaling", "count_tokens"),
    "jain": Entry(baselines.OppositeGuidanceOptions, "OppositeGuidance"),
    "prss": Entry(baselines.PromptReanchoringOptions, "PromptReanchoring", "prompts"),
    "sail": Entry(baselines.SharpnessAwareOptions, "SharpnessAwareInitialization"),
}
WITH_AMG = ("amg", "both")
WITH_INDEX = ("amg", "multiplicity", "both", "reject")
TEXT_ONLY = tuple(name for name, entry in MITIGATIONS.items() if entry.baseline)
"""Baselines of docs/baselines.md, for text-to-image models only."""


def is_import_path(name: str) -> bool:
    """Whether a mitigation is named by an import path, as ``package.module.Class``."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def imported(path: str) -> Any:
    """The object at an import path; importing runs its module."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--mitigation {path} cannot be imported: {error}") from error


def record_paths(name: str) -> dict[str, str]:
    """By option, its field of ``GuidanceSettings``; a baseline's are nested: ``wen.target``."""
    shared = {one.name: one.name for one in fields(MitigationOptions)}
    if name not in MITIGATIONS:
        return shared
    prefix = f"{name}." if MITIGATIONS[name].baseline else ""
    own = MITIGATIONS[name].options
    assert is_dataclass(own)
    return {**shared, **{one.name: prefix + one.name for one in fields(own)}}


def sampling_options(subject: Mapping[str, Any]) -> dict[str, Any]:
    """``sample.py`` options of a study's subject; ``wen.target`` is an old name of ``target``."""
    own = record_paths(subject.get("mitigation", "none"))
    paths = (path for name in MITIGATIONS for path in record_paths(name).values())
    record = {path.split(".")[0] for path in paths}

    def option(key: str) -> str:
        if key == "mitigation":
            return key
        old = key not in own and key.split(".")[0] in record
        return f"guidance.{key}" if old else f"mitigation.{key}"

    return {option(key): value for key, value in subject.items()}
