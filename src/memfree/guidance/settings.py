"""Guidance as options: what `sample.py --guidance.…` takes, and the recommended values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from memfree.calibration_size import DEFAULT_RATE
from memfree.guidance import baselines
from memfree.guidance.amg import AntiMemorizationGuidance
from memfree.guidance.calibration import calibration_of, default_similarity
from memfree.guidance.detection import Cadence, Observer
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.multiplicity import MultiplicityGuidance
from memfree.guidance.prediction import Guidance
from memfree.guidance.threshold import ConstantThreshold, ThresholdSchedule

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex

MitigationName = Literal[
    "none",
    "amg",
    "multiplicity",
    "both",
    "reject",
    "lower_guidance",
    "rt",
    "rna",
    "cwr",
    "gni",
    "wen",
    "ren",
    "jain",
    "prss",
    "sail",
]
WITH_AMG = ("amg", "both")
"""Mitigations that AMG is part of."""
WITH_INDEX = ("amg", "multiplicity", "both", "reject")
"""Mitigations that need a reference index."""
TEXT_ONLY = ("lower_guidance", "rt", "rna", "cwr", "gni", "wen", "ren", "jain", "prss", "sail")
"""The field's baselines (docs/baselines.md), which run on text-to-image models alone."""


@dataclass
class GuidanceSettings:
    """Which guidance steers the sampler, and how hard (docs/method.md explains the defaults)."""

    mitigation: MitigationName = "none"
    """none; amg (Chen et al., 2024); multiplicity (ours); both: multiplicity, then AMG; reject:
    draw again while the finished sample is above the calibrated threshold. For text-to-image
    models also the field's baselines: lower_guidance, rt, rna, cwr, gni, wen, ren, jain, prss,
    sail (docs/baselines.md)."""
    false_positive_rate: float = DEFAULT_RATE
    """λ_t ends (t = 0) at the threshold that this share of held-out real images exceeds."""
    schedule: Literal["rising", "constant"] = "rising"
    """λ_t: rising as t falls (eq. 19), or constant at its end point (the paper's ablation)."""
    gated: bool = True
    """False opens the gate to every sample at every step (the paper's ablation)."""
    start_ratio: float = 1.4
    """Where λ_t starts, as a multiple of its (negative) end point; 1.3 in the paper."""
    rate: float = 0.025
    """c of eq. 19, per step of a 250-step grid."""
    gate_margin: float = 0.1
    """The gate opens this far below λ_t, in units of σ."""
    c1: float = 5.0
    """Despecification (eq. 13); 0 switches it off."""
    c2: float = 5.0
    """Caption or label deduplication (eq. 15); 0 switches it off."""
    c3: float = 300.0
    """Dissimilarity guidance (eq. 17); 0 switches it off."""
    max_displacement: float = 1.0
    """G_sim moves x̂_0 by at most this root mean square a step; 0: no limit."""
    final_correction: bool = True
    """Move what is still too near at the last step just past λ_0 (and the margin)."""
    gradient: Literal["clean_estimate", "denoiser"] = "clean_estimate"
    """Take ∇σ through x̂_0 alone, or through the denoiser as well (slower)."""
    strength: float = 1.5
    """κ of multiplicity guidance."""
    caption_bandwidth: NonNegativeFloat = 0.0
    """How far captions other than the prompt count in multiplicity guidance of text-to-image:
    exp(−(1 − cosine)/caption_bandwidth) of their embeddings; 0: equal captions alone."""
    cadence: PositiveInt = 1
    """Search the nearest images every so many steps only, until λ_t has risen (time 0.3): cheaper,
    but guidance may begin late by as many steps."""
    budget: PositiveInt = 10
    """Draws of a sample under reject; the last one is kept whatever it is."""
    lower_guidance: baselines.LowerGuidanceOptions = field(
        default_factory=baselines.LowerGuidanceOptions
    )
    """Lower classifier-free guidance."""
    rt: baselines.Insertion = field(default_factory=baselines.Insertion)
    """Random tokens in the prompt (Somepalli et al., 2023)."""
    rna: baselines.Insertion = field(default_factory=baselines.Insertion)
    """Random numbers in the prompt (Somepalli et al., 2023)."""
    cwr: baselines.Insertion = field(default_factory=baselines.Insertion)
    """Repeated words of the prompt (Somepalli et al., 2023)."""
    gni: baselines.EmbeddingNoiseOptions = field(default_factory=baselines.EmbeddingNoiseOptions)
    """Gaussian noise on the prompt's embedding (Somepalli et al., 2023)."""
    wen: baselines.PromptEmbeddingOptions = field(default_factory=baselines.PromptEmbeddingOptions)
    """Optimisation of the prompt's embedding (Wen et al., 2024)."""
    ren: baselines.AttentionRescalingOptions = field(
        default_factory=baselines.AttentionRescalingOptions
    )
    """Rescaled cross-attention (Ren et al., 2024)."""
    jain: baselines.OppositeGuidanceOptions = field(
        default_factory=baselines.OppositeGuidanceOptions
    )
    """Opposite guidance before a transition point (Jain et al., 2025)."""
    prss: baselines.PromptReanchoringOptions = field(
        default_factory=baselines.PromptReanchoringOptions
    )
    """Prompt re-anchoring and semantic search (Chen et al., 2025)."""
    sail: baselines.SharpnessAwareOptions = field(default_factory=baselines.SharpnessAwareOptions)
    """Optimised initial noise (Jeon et al., 2025)."""

    def build(self, index: ReferenceIndex, latents: ReferenceIndex | None = None) -> list[Guidance]:
        """The guidances, in order; an observer alone for ``none``.

        Args:
            index: calibrated; what AMG compares with.
            latents: references of multiplicity guidance where the denoiser does not work on the
                pixels of ``index``.
        """
        guidances: list[Guidance] = []
        if self.mitigation in ("multiplicity", "both"):
            guidances.append(
                MultiplicityGuidance(latents or index, self.strength, self.caption_bandwidth)
            )
        if self.mitigation in WITH_AMG:
            guidances.append(self.anti_memorization(index))
        else:
            guidances.append(self.observer(index))
        return guidances

    def for_text(
        self,
        index: ReferenceIndex | None = None,
        text: baselines.TextTools | None = None,
        latents: ReferenceIndex | None = None,
    ) -> Mitigation:
        """The mitigation with all its stages, for a text-to-image model.

        Args:
            index: calibrated references, on the device of the samples; with one, whatever does not
                detect copies itself is followed by an observer, so that every trace has σ_t.
            text: the model's tokenizer, and prompts for PRSS to search.
            latents: references of multiplicity guidance, in the denoiser's own space.

        Raises:
            ValueError: the mitigation needs an index or the text side, and it is missing.
        """
        if self.mitigation in WITH_INDEX and index is None:
            raise ValueError(f"--guidance.mitigation {self.mitigation} needs --index")
        guided: list[Mitigation] = []
        if index is not None:
            guided = [baselines.Guided(self.build(index, latents))]
        if self.mitigation == "reject":
            assert index is not None
            end = self.end_threshold(index)
            guided.append(baselines.RejectAndResample(index, default_similarity(index), end))
        parts = [*self._baseline(text), *guided]
        return parts[0] if len(parts) == 1 else baselines.Sequential(parts)

    def _baseline(self, text: baselines.TextTools | None) -> list[Mitigation]:
        """The named baseline of the field; empty for mitigations that are none."""
        name = self.mitigation
        needs_text = name in ("rt", "ren") or (name == "prss" and self.prss.alternative == "search")
        if needs_text and text is None:
            raise ValueError(f"--guidance.mitigation {name} needs the model's tokenizer")
        if name == "rt":
            assert text is not None
            return [baselines.RandomTokens(text.words, self.rt)]
        if name == "ren":
            assert text is not None
            return [baselines.AttentionRescaling(text.count_tokens, self.ren)]
        if name == "prss":
            prompts = [] if text is None else text.prompts
            return [baselines.PromptReanchoring(prompts, self.prss)]
        plain: dict[str, Callable[[], Mitigation]] = {
            "lower_guidance": lambda: baselines.LowerGuidance(self.lower_guidance),
            "rna": lambda: baselines.RandomNumbers(self.rna),
            "cwr": lambda: baselines.RepeatedWords(self.cwr),
            "gni": lambda: baselines.EmbeddingNoise(self.gni),
            "wen": lambda: baselines.PromptEmbeddingOptimization(self.wen),
            "jain": lambda: baselines.OppositeGuidance(self.jain),
            "sail": lambda: baselines.SharpnessAwareInitialization(self.sail),
        }
        return [plain[name]()] if name in plain else []

    @property
    def needs_captions(self) -> bool:
        """Whether AMG steers away from captions (eq. 15): of text-to-image, if s_0 is above 1."""
        return self.mitigation in WITH_AMG and self.c2 > 0

    def end_threshold(self, index: ReferenceIndex) -> float:
        """λ at t = 0: the index's calibrated threshold."""
        similarity = default_similarity(index)
        return calibration_of(index, similarity).threshold(self.false_positive_rate)

    def observer(self, index: ReferenceIndex) -> Observer:
        """What records σ_t against λ_t and changes nothing."""
        end = self.end_threshold(index)
        return Observer(
            index, default_similarity(index), self._threshold(end), Cadence(int(self.cadence))
        )

    def anti_memorization(self, index: ReferenceIndex) -> AntiMemorizationGuidance:
        """AMG with these settings on the index's calibrated threshold."""
        end = self.end_threshold(index)
        return AntiMemorizationGuidance(
            index,
            default_similarity(index),
            self._threshold(end),
            c1=self.c1,
            c2=self.c2,
            c3=self.c3,
            gate_margin=self.gate_margin,
            max_displacement=self.max_displacement or None,
            final_correction=end - self.gate_margin / 4 if self.final_correction else None,
            gradient=self.gradient,
            gated=self.gated,
            cadence=Cadence(int(self.cadence)),
        )

    def _threshold(self, end: float) -> ThresholdSchedule | ConstantThreshold:
        if self.schedule == "constant":
            return ConstantThreshold(end)
        # A distance's σ is negative: a multiple above 1 is lower. A cosine's is positive.
        start = end * self.start_ratio if end < 0 else end / self.start_ratio
        return ThresholdSchedule(start, end, self.rate)
