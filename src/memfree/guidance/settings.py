"""GuidanceSettings: every option of guidance, their recommended values, and what they build."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from memfree.data.split import DEFAULT_RATE
from memfree.guidance import baselines
from memfree.guidance.mitigation_names import (
    CAPTION_NEIGHBOURS,
    CAPTION_RECORDS,
    WITH_AMG,
    WITH_INDEX,
    MitigationName,
    Through,
)
from memfree.retrieval.options import CaptionPolicy

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.guidance.amg_extensions import SteadyAMG
    from memfree.guidance.equations import ConstantThreshold, ThresholdSchedule
    from memfree.guidance.mitigation import Mitigation
    from memfree.guidance.observer import Cadence, Observer
    from memfree.guidance.prediction import Guidance
    from memfree.retrieval import ReferenceIndex

PIXELS: dict[str, float | bool] = {
    "start_ratio": 1.4,
    "gate_margin": 0.1,
    "margin_per_doubling": 0.0,
    "max_displacement": 1.0,
    "least_scale": 1.0,
    "latched": False,
}
"""For ``NormalizedL2``, whose σ is a negative distance: 0 for the same image."""
EMBEDDINGS: dict[str, float | bool] = {
    "start_ratio": 1.16,
    "gate_margin": 0.05,
    "margin_per_doubling": 0.05,
    "max_displacement": 0.6,
    "least_scale": 0.0,
    "latched": True,
}
"""For ``EmbeddingSimilarity``, a cosine: 1 for the same image."""
EMBEDDINGS_ALONE: dict[str, float | bool] = {**EMBEDDINGS, "max_displacement": 2.0}
"""The same for AMG by itself: without multiplicity guidance, G_sim has to choose another picture,
and a short step only puts a pattern on the memorized one that the embedding takes for a change."""


def recommended(index: ReferenceIndex, alone: bool) -> dict[str, float | bool]:
    """The recommended settings for the default similarity of an index.

    Args:
        index: the references.
        alone: whether AMG acts without multiplicity guidance.
    """
    if index.metric == "l2":
        return PIXELS
    return EMBEDDINGS_ALONE if alone else EMBEDDINGS


@dataclass
class GuidanceSettings:
    """Which guidance steers the sampler, and how hard (docs/method.md explains the defaults).

    Settings that are None have a recommended value for pixels and one for embeddings.
    """

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
    start_ratio: PositiveFloat | None = None
    """Where λ_t starts, as a multiple of its end point (pixels; None: 1.4, in the paper 1.3) or a
    fraction 1/start_ratio of it (embeddings; None: 1.16, in the authors' code 1.33)."""
    rate: PositiveFloat = 0.025
    """c of eq. 19, per step of a 250-step grid."""
    gate_margin: NonNegativeFloat | None = None
    """The gate opens this far below λ_t, in units of σ. None: 0.1, embeddings 0.05."""
    margin_per_doubling: NonNegativeFloat | None = None
    """The margin grows by this with every doubling of the training records of the nearest image,
    those that the prompt asks for (caption_bandwidth). None: 0, embeddings 0.05."""
    c1: NonNegativeFloat = 5.0
    """Despecification (eq. 13); 0 switches it off."""
    c2: NonNegativeFloat = 5.0
    """Caption or label deduplication (eq. 15); 0 switches it off."""
    caption_policy: CaptionPolicy = "nearest"
    """Which caption c2 steers away from: the nearest image's (nearest, the paper's), or the most
    common among the nearest (most_common, the authors' code's)."""
    caption_neighbours: PositiveInt = CAPTION_NEIGHBOURS
    """How many nearest images most_common counts, near copies as one; 1000 of the billions of
    LAION in the authors' code."""
    caption_records: NonNegativeInt = CAPTION_RECORDS
    """The most common caption is taken if more training records than this have it, else the
    nearest image's; 20 in the authors' code."""
    c3: NonNegativeFloat = 300.0
    """Dissimilarity guidance (eq. 17); 0 switches it off."""
    max_displacement: NonNegativeFloat | None = None
    """G_sim moves x̂_0 by at most this root mean square a step; 0: no limit. None: 1, embeddings
    0.6 after multiplicity guidance and 2 without."""
    least_scale: ClosedUnitInterval | None = None
    """What c1 and c2 leave of the guidance scale near a repeated image: 1, the conditional
    prediction, in the paper; 0: down to the unconditional one, for prompts of one memorized image.
    None: 1, embeddings 0."""
    latched: bool | None = None
    """A sample whose gate was opened by a repeated image keeps c1 and c2 to the end: its prompt
    does not call it back. None: false, embeddings true."""
    final_correction: bool = True
    """Move what is still too near at the last step past λ_0, by a quarter of gate_margin."""
    gradient: Through = "clean_estimate"
    """Take ∇σ through x̂_0 alone, or through the denoiser as well (slower)."""
    strength: NonNegativeFloat = 1.5
    """κ of multiplicity guidance."""
    caption_bandwidth: NonNegativeFloat = 0.3
    """How far records with other captions than the prompt count, in multiplicity guidance and in
    the repeated images of AMG: by exp(−(1 − cosine)/caption_bandwidth); 0: equal captions alone."""
    damp_captions: bool = True
    """In multiplicity guidance of text-to-image, a caption of repeated images counts as much as it
    would after deduplication: 1/m for one image with m records."""
    cadence: PositiveInt = 1
    """Search the nearest images every so many steps only, until cadence_always_below: cheaper, but
    guidance may begin late by as many steps."""
    cadence_always_below: ClosedUnitInterval = 0.3
    """Search at every step from this time on (1 is noise, 0 the image), where λ_t has risen."""
    wen_norm_steps: NonNegativeInt = 0
    """Record Wen's norm, the mean of ‖ε_c − ε_∅‖ over this many first steps, as wen_norm in the
    trace; 0: do not. Of text-to-image models, where the guidance scale is above 1."""
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

    def resolved(self, index: ReferenceIndex | None) -> GuidanceSettings:
        """The same with the recommended values for this index where nothing is set."""
        if index is None:
            return self
        unset = {
            name: value
            for name, value in recommended(index, self.mitigation == "amg").items()
            if getattr(self, name) is None
        }
        return replace(self, **unset)  # type: ignore[arg-type]

    def build(self, index: ReferenceIndex, latents: ReferenceIndex | None = None) -> list[Guidance]:
        """The guidances, in order; an observer alone for ``none``.

        Args:
            index: calibrated; what AMG compares with.
            latents: references of multiplicity guidance where the denoiser does not work on the
                pixels of ``index``.
        """
        from memfree.guidance.multiplicity import MultiplicityGuidance

        guidances: list[Guidance] = []
        if self.mitigation in ("multiplicity", "both"):
            guidances.append(
                MultiplicityGuidance(
                    latents or index, self.strength, self.caption_bandwidth, self.damp_captions
                )
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
        from memfree.guidance.baselines.by_name import baseline
        from memfree.guidance.baselines.wen_norm import WenNorm
        from memfree.guidance.mitigation import Guided, Sequential

        if self.mitigation in WITH_INDEX and index is None:
            raise ValueError(f"--guidance.mitigation {self.mitigation} needs --index")
        guided = [] if index is None else self._guided(index, latents)
        steps = int(self.wen_norm_steps)
        norm = [Guided([WenNorm(steps)])] if steps else []
        parts = [*norm, *baseline(self.mitigation, self._options, text), *guided]
        return parts[0] if len(parts) == 1 else Sequential(parts)

    def for_pixels(self, index: ReferenceIndex) -> Mitigation:
        """The mitigation with its stages, for a model without text.

        Args:
            index: calibrated references, on the device of the samples.
        """
        from memfree.guidance.mitigation import Sequential

        return Sequential(self._guided(index))

    def _guided(
        self, index: ReferenceIndex, latents: ReferenceIndex | None = None
    ) -> list[Mitigation]:
        """What compares samples with an index: while they are drawn, and when they are finished."""
        from memfree.guidance.calibration import default_similarity
        from memfree.guidance.mitigation import Guided, RejectAndResample

        guided: list[Mitigation] = [Guided(self.build(index, latents))]
        if self.mitigation == "reject":
            end = self.end_threshold(index)
            guided.append(RejectAndResample(index, default_similarity(index), end))
        return guided

    def check(self, index: ReferenceIndex | None, text: baselines.TextTools | None) -> None:
        """Refuse wrong settings where that costs nothing, before anything is drawn or written.

        Args:
            index: as of ``for_text``, on any device.
            text: as of ``for_text``; None for a model without text.

        Raises:
            ValueError: a setting is wrong by itself, or for this index or model.
        """
        from memfree.guidance.baselines.by_name import baseline

        if index is not None and self.mitigation in WITH_AMG:
            self.anti_memorization(index)
        baseline(self.mitigation, self._options, text)

    @property
    def _options(self) -> Any:
        """The options of the mitigation that is named; None where it has none of its own."""
        return getattr(self, self.mitigation, None)

    @property
    def needs_captions(self) -> bool:
        """Whether AMG steers away from captions (eq. 15): of text-to-image, if s_0 is above 1."""
        return self.mitigation in WITH_AMG and self.c2 > 0

    def end_threshold(self, index: ReferenceIndex) -> float:
        """λ at t = 0: the index's calibrated threshold."""
        from memfree.guidance.calibration import calibration_of, default_similarity

        similarity = default_similarity(index)
        return calibration_of(index, similarity).threshold(self.false_positive_rate)

    def observer(self, index: ReferenceIndex) -> Observer:
        """What records σ_t against λ_t and changes nothing."""
        from memfree.guidance.calibration import default_similarity
        from memfree.guidance.observer import Observer

        similarity, threshold = default_similarity(index), self._threshold(index)
        return Observer(index, similarity, threshold, self._cadence)

    def anti_memorization(self, index: ReferenceIndex) -> SteadyAMG:
        """AMG with these settings on the index's calibrated threshold."""
        from memfree.guidance.amg_extensions import SteadyAMG
        from memfree.guidance.calibration import default_similarity

        this, end = self.resolved(index), self.end_threshold(index)
        assert this.gate_margin is not None and this.margin_per_doubling is not None
        assert this.least_scale is not None and this.latched is not None
        return SteadyAMG(
            index,
            default_similarity(index),
            self._threshold(index),
            c1=self.c1,
            c2=self.c2,
            c3=self.c3,
            gate_margin=this.gate_margin,
            max_displacement=this.max_displacement or None,
            final_correction=end - this.gate_margin / 4 if self.final_correction else None,
            gradient=self.gradient,
            gated=self.gated,
            margin_per_doubling=this.margin_per_doubling,
            least_scale=this.least_scale,
            latched=this.latched,
            cadence=self._cadence,
            caption_policy=self.caption_policy,
            caption_neighbours=int(self.caption_neighbours),
            caption_records=int(self.caption_records),
            caption_bandwidth=float(self.caption_bandwidth),
        )

    @property
    def _cadence(self) -> Cadence:
        from memfree.guidance.observer import Cadence

        return Cadence(int(self.cadence), float(self.cadence_always_below))

    def _threshold(self, index: ReferenceIndex) -> ThresholdSchedule | ConstantThreshold:
        from memfree.guidance.equations import ConstantThreshold, ThresholdSchedule

        end, ratio = self.end_threshold(index), self.resolved(index).start_ratio
        assert ratio is not None
        if ratio <= 0:
            raise ValueError(f"--guidance.start_ratio must be above 0, not {ratio:g}")
        if self.schedule == "constant":
            return ConstantThreshold(end)
        # A distance's σ is negative: a multiple above 1 is lower. A cosine's is positive.
        return ThresholdSchedule(end * ratio if end < 0 else end / ratio, end, self.rate)
