"""GuidanceSettings: all options of guidance, their recommended values, and what they build."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from memfree import guidance
from memfree.guidance import baselines
from memfree.guidance.options import (
    MITIGATIONS,
    WITH_AMG,
    WITH_INDEX,
    BothOptions,
    RejectOptions,
    is_import_path,
)

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.guidance import (
        Cadence,
        ConstantThreshold,
        Guidance,
        Mitigation,
        Observer,
        SteadyAMG,
        ThresholdSchedule,
    )
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
"""For AMG alone: G_sim must choose another picture, and short steps only add a pattern that the
embedding takes for a change."""


def recommended(index: ReferenceIndex, alone: bool) -> dict[str, float | bool]:
    """The recommended settings for an index; ``alone``: AMG without multiplicity guidance."""
    if index.metric == "l2":
        return PIXELS
    return EMBEDDINGS_ALONE if alone else EMBEDDINGS


def _defaults(options: type) -> Any:
    return field(default_factory=options)


@dataclass
class _Named:
    mitigation: str = "none"
    """A name of ``options.MITIGATIONS``, or the import path of your own ``Mitigation``."""


@dataclass
class GuidanceSettings(BothOptions, RejectOptions, _Named):
    """Which guidance steers the sampler, and how hard (docs/method.md explains the defaults).

    Sample folders keep this record. Only the options of the named mitigation act; those that are
    None have a recommended value for pixels and one for embeddings.
    """

    lower_guidance: baselines.LowerGuidanceOptions = _defaults(baselines.LowerGuidanceOptions)
    rt: baselines.Insertion = _defaults(baselines.Insertion)
    rna: baselines.Insertion = _defaults(baselines.Insertion)
    cwr: baselines.Insertion = _defaults(baselines.Insertion)
    gni: baselines.EmbeddingNoiseOptions = _defaults(baselines.EmbeddingNoiseOptions)
    wen: baselines.PromptEmbeddingOptions = _defaults(baselines.PromptEmbeddingOptions)
    ren: baselines.AttentionRescalingOptions = _defaults(baselines.AttentionRescalingOptions)
    jain: baselines.OppositeGuidanceOptions = _defaults(baselines.OppositeGuidanceOptions)
    prss: baselines.PromptReanchoringOptions = _defaults(baselines.PromptReanchoringOptions)
    sail: baselines.SharpnessAwareOptions = _defaults(baselines.SharpnessAwareOptions)

    def __post_init__(self) -> None:
        if self.mitigation not in MITIGATIONS and not is_import_path(self.mitigation):
            raise ValueError(
                f"--mitigation {self.mitigation} is not one of {', '.join(MITIGATIONS)}, nor the "
                "import path of a class"
            )

    def resolved(self, index: ReferenceIndex | None) -> GuidanceSettings:
        """These settings with the recommended values for this index where unset."""
        if index is None:
            return self
        unset = {
            name: value
            for name, value in recommended(index, self.mitigation == "amg").items()
            if getattr(self, name) is None
        }
        return replace(self, **unset)  # type: ignore[arg-type]

    def build(self, index: ReferenceIndex, latents: ReferenceIndex | None = None) -> list[Guidance]:
        """Guidances in order, AMG or an observer last; ``latents``: for multiplicity guidance."""
        detector = self.anti_memorization if self.mitigation in WITH_AMG else self.observer
        if self.mitigation not in ("multiplicity", "both"):
            return [detector(index)]
        references = latents or index
        multiplicity = guidance.MultiplicityGuidance(
            references, self.strength, self.caption_bandwidth, self.damp_captions
        )
        return [multiplicity, detector(index)]

    def for_text(
        self,
        index: ReferenceIndex | None = None,
        text: baselines.TextTools | None = None,
        latents: ReferenceIndex | None = None,
    ) -> Mitigation:
        """The mitigation with all its stages, for a text-to-image model.

        Args:
            index: calibrated references, on the samples' device; with one, every trace has σ_t.
            text: the model's tokenizer, and the prompts that PRSS searches.
            latents: multiplicity guidance's references, in the denoiser's own space.
        """
        if self.mitigation in WITH_INDEX and index is None:
            raise ValueError(f"--mitigation {self.mitigation} needs --index")
        steps = int(self.wen_norm_steps)
        norm = [guidance.Guided([baselines.WenNorm(steps)])] if steps else []
        parts = [*norm, *self._named(text), *self._compared(index, latents)]
        return parts[0] if len(parts) == 1 else guidance.Sequential(parts)

    def for_pixels(self, index: ReferenceIndex | None) -> Mitigation:
        """The mitigation for a model without text; without an index, your own has no trace."""
        own = [] if self.mitigation in MITIGATIONS else self._named(None)
        return guidance.Sequential([*own, *self._compared(index, None)])

    def _named(self, text: baselines.TextTools | None) -> list[Mitigation]:
        name = self.mitigation
        if name not in MITIGATIONS:
            return [guidance.mitigation_at(name)]
        entry = MITIGATIONS[name]
        if not entry.baseline:
            return []
        needs_text = entry.text and (name != "prss" or self.prss.alternative == "search")
        if needs_text and text is None:
            raise ValueError(f"--mitigation {name} needs the model's tokenizer")
        first = [getattr(text, entry.text, [])] if entry.text else []
        return [getattr(baselines, entry.baseline)(*first, getattr(self, name))]

    def _compared(
        self, index: ReferenceIndex | None, latents: ReferenceIndex | None
    ) -> list[Mitigation]:
        if index is None:
            return []
        guided: list[Mitigation] = [guidance.Guided(self.build(index, latents))]
        if self.mitigation == "reject":
            similarity, end = guidance.default_similarity(index), self.end_threshold(index)
            guided.append(guidance.RejectAndResample(index, similarity, end))
        return guided

    def check(self, index: ReferenceIndex | None, text: baselines.TextTools | None) -> None:
        """Refuse wrong settings before anything costly; arguments as in ``for_text``."""
        if index is not None and self.mitigation in WITH_AMG:
            self.anti_memorization(index)
        self._named(text)

    @property
    def needs_captions(self) -> bool:
        """Whether AMG steers away from captions (eq. 15), in text-to-image with s_0 above 1."""
        return self.mitigation in WITH_AMG and self.c2 > 0

    def end_threshold(self, index: ReferenceIndex) -> float:
        """λ at t = 0: the index's calibrated threshold."""
        similarity = guidance.default_similarity(index)
        return guidance.calibration_of(index, similarity).threshold(self.false_positive_rate)

    def observer(self, index: ReferenceIndex) -> Observer:
        """The observer of σ_t against λ_t."""
        similarity, threshold = guidance.default_similarity(index), self._threshold(index)
        return guidance.Observer(index, similarity, threshold, self._cadence)

    def anti_memorization(self, index: ReferenceIndex) -> SteadyAMG:
        """AMG with these settings on the index's calibrated threshold."""
        this, end = self.resolved(index), self.end_threshold(index)
        assert this.gate_margin is not None
        same = "c1 c2 c3 gate_margin gradient gated margin_per_doubling least_scale latched"
        return guidance.SteadyAMG(
            index,
            guidance.default_similarity(index),
            self._threshold(index),
            max_displacement=this.max_displacement or None,
            final_correction=end - this.gate_margin / 4 if self.final_correction else None,
            cadence=self._cadence,
            caption_neighbours=int(self.caption_neighbours),
            caption_policy=self.caption_policy,
            caption_records=int(self.caption_records),
            caption_bandwidth=float(self.caption_bandwidth),
            **{name: getattr(this, name) for name in same.split()},
        )

    @property
    def _cadence(self) -> Cadence:
        return guidance.Cadence(int(self.cadence), float(self.cadence_always_below))

    def _threshold(self, index: ReferenceIndex) -> ThresholdSchedule | ConstantThreshold:
        end, ratio = self.end_threshold(index), self.resolved(index).start_ratio
        assert ratio is not None
        if ratio <= 0:
            raise ValueError(f"--mitigation.start_ratio must be above 0, not {ratio:g}")
        if self.schedule == "constant":
            return guidance.ConstantThreshold(end)
        # A distance's σ is negative: a multiple above 1 is lower. A cosine's is positive.
        return guidance.ThresholdSchedule(end * ratio if end < 0 else end / ratio, end, self.rate)
