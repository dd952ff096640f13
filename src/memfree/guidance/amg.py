"""Anti-Memorization Guidance (Chen, Liu, Xu, CVPR 2024): detect, gate, and steer away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.calibration_size import DEFAULT_RATE
from memfree.conditions import differ
from memfree.guidance import corrections
from memfree.guidance.asked_records import AskedRecords
from memfree.guidance.detection import EVERY_STEP, Cadence, Detection, Observer, recorded
from memfree.guidance.displacement import limit_displacement, move_below
from memfree.guidance.latch import Call, nearest_call, where
from memfree.guidance.mitigation_names import CAPTION_NEIGHBOURS, CAPTION_RECORDS, Through
from memfree.guidance.neighbour_conditions import NeighbourConditions
from memfree.guidance.prediction import Prediction, row_norm
from memfree.guidance.sigma_gradient import sigma_gradient
from memfree.guidance.similarity import Match, Similarity
from memfree.guidance.threshold import ConstantThreshold, ThresholdSchedule

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.options import CaptionPolicy


class AntiMemorizationGuidance(Observer):
    """ε̂ ← ε̂ + 1{σ_t > λ_t}·(G_spe + G_dup + G_sim), per sample (eq. 8 to 19).

    With the defaults this is the paper's method and no more. ``gate_margin``,
    ``max_displacement``, ``final_correction``, ``margin_per_doubling``, ``least_scale`` and
    ``latched`` are ours (docs/method.md says why); ``AntiMemorizationGuidance.recommended``
    switches on those that help for the index's similarity.

    Args:
        index: references.
        similarity: ``NormalizedL2`` (eq. 8) or ``EmbeddingSimilarity`` (eq. 9).
        threshold: λ_t, a function of time in [0, 1].
        c1: strength of despecification (eq. 13); 0 switches it off.
        c2: strength of caption deduplication (eq. 15); 0 switches it off.
        c3: strength of dissimilarity guidance (eq. 17); 0 switches it off.
        gate_margin: the gate opens at λ_t − gate_margin, in units of σ.
        max_displacement: G_sim moves x̂_0 by at most this root mean square a step; None: no limit.
        final_correction: move what is still above this σ at the last step just below it;
            None: no correction.
        gradient: take ∇_{x_t} σ_t through x̂_0 with ε̂ held constant (default), or through the
            denoiser as well.
        gated: False opens the gate to every sample at every step: the ablation of eq. 10. With
            ``NormalizedL2`` only G_sim then acts below λ_t: c_1 and c_2 multiply how far σ_t is
            above the gate, which is 0 there.
        margin_per_doubling: the margin grows by this with every doubling of the records m of the
            nearest image (``caption_bandwidth``: which of them): gate_margin +
            margin_per_doubling·log_2 m. That a sample will copy an image is the more likely the
            more often the model saw it, long before it is near.
        least_scale: what despecification and deduplication leave of s_0 at least where the nearest
            image is repeated. 1 in the paper: the conditional prediction, which for a prompt that
            belongs to one memorized image is that image. 0: down to the unconditional prediction.
        latched: a sample whose gate was opened by a repeated image keeps its G_spe and G_dup, at
            the highest σ so far, to the end. Without it, a sample that has left a memorized image
            is called back by its prompt as soon as the gate closes, and ends at the threshold.
        cadence: when neighbours are searched; see ``Cadence``.
        caption_policy: which caption is y_N of eq. 15: the nearest image's (``nearest``, the
            paper's), or the most common of the k nearest (``most_common``, the authors' code's);
            see ``NeighbourConditions``.
        caption_neighbours: k of ``most_common``.
        caption_records: m of ``most_common``.
        caption_bandwidth: a repeated image has the records that the sample's prompt asks for, by
            a kernel of this bandwidth (``AskedRecords``). None: all of them, whatever the prompt.
    """

    def __init__(
        self,
        index: ReferenceIndex,
        similarity: Similarity,
        threshold: ThresholdSchedule | ConstantThreshold,
        c1: float = 0.0,
        c2: float = 0.0,
        c3: float = 0.0,
        gate_margin: float = 0.0,
        max_displacement: float | None = None,
        final_correction: float | None = None,
        gradient: Through = "clean_estimate",
        gated: bool = True,
        margin_per_doubling: float = 0.0,
        least_scale: float = 1.0,
        latched: bool = False,
        cadence: Cadence = EVERY_STEP,
        caption_policy: CaptionPolicy = "nearest",
        caption_neighbours: int = CAPTION_NEIGHBOURS,
        caption_records: int = CAPTION_RECORDS,
        caption_bandwidth: float | None = None,
    ) -> None:
        super().__init__(index, similarity, threshold, cadence)
        at_least_0 = {
            "c1": c1,
            "c2": c2,
            "c3": c3,
            "gate_margin": gate_margin,
            "margin_per_doubling": margin_per_doubling,
        }
        for name, value in at_least_0.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value:g}")
        if not 0 <= least_scale <= 1:
            raise ValueError(f"least_scale must be in [0, 1], not {least_scale:g}")
        if max_displacement is not None and max_displacement <= 0:
            raise ValueError(f"max_displacement must be above 0, not {max_displacement:g}")
        self.c1 = c1
        self.c2 = c2
        self.c3 = c3
        self.gate_margin = gate_margin
        self.max_displacement = max_displacement
        self.final_correction = final_correction
        self.gradient = gradient
        self.gated = gated
        self.margin_per_doubling = margin_per_doubling
        self.least_scale = least_scale
        self.latched = latched
        self.records = AskedRecords(index, caption_bandwidth)
        self.neighbour_conditions = NeighbourConditions(
            index, caption_policy, caption_neighbours, caption_records
        )

    @classmethod
    def recommended(
        cls, index: ReferenceIndex, false_positive_rate: float = DEFAULT_RATE
    ) -> AntiMemorizationGuidance:
        """The settings that docs/method.md explains, on the index's calibrated threshold."""
        from memfree.guidance.settings import GuidanceSettings

        return GuidanceSettings(
            mitigation="amg", false_positive_rate=false_positive_rate
        ).anti_memorization(index)

    @property
    def needs_text_encoder(self) -> bool:
        """Whether captions are encoded to steer away from them (eq. 15), where s_0 is above 1."""
        return self.c2 > 0

    @property
    def calls_denoiser(self) -> bool:
        """Whether the denoiser may be called: for captions (eq. 16), or for its gradient."""
        return self.c2 > 0 or (self.c3 > 0 and self.gradient == "denoiser")

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        """Correct the active rows; all others keep their bits."""
        detection = self.detect(prediction)
        match, threshold = detection.match, detection.threshold
        now = self._call(prediction, detection)
        near = self.opens(detection, now.records)
        held, steering = near & (now.records > 1), now
        if self.latched:
            latch = nearest_call(prediction, self, now, held)
            held = latch.match.sigma.isfinite()
            steering = where(latch.match.sigma > match.sigma, latch, now)
        active = near | held
        prediction = recorded(prediction, detection).activated(active)
        rows = active.nonzero().squeeze(1)
        zeros = torch.zeros_like(match.sigma)
        columns = {name: zeros.clone() for name in ("s1", "s2", "g_sim_norm")}
        columns["gate"] = threshold - self.margin(now.records)
        if len(rows):
            result = self._despecified(prediction, steering, threshold, held, rows, columns)
            if self.latched and self.c3 > 0:
                rows = near.nonzero().squeeze(1)  # without a latch, all that are active
            if self.c3 > 0 and len(rows):
                # The gradient is at x̂_0 as it was detected, before anything was changed.
                g_sim = self._g_sim(prediction, match, rows)
                columns["g_sim_norm"][rows] = row_norm(g_sim)
                result = result.with_eps_change(g_sim, rows)
            prediction = result
        if prediction.is_last and self.final_correction is not None:
            prediction = self._correct_last(prediction, match.sigma, active, self.final_correction)
        return prediction.recorded(**columns)

    def opens(self, detection: Detection, records: Tensor) -> Tensor:
        """The gate of eq. 10 with its margin, (B,) bool; open to all if ``gated`` is False."""
        sigma = detection.match.sigma
        if not self.gated:
            return torch.ones_like(sigma, dtype=torch.bool)
        return corrections.gate(sigma, detection.threshold - self.margin(records))

    def _call(self, prediction: Prediction, detection: Detection) -> Call:
        """The nearest images with their m(y), which needs a text encoder: where it may matter."""
        match = detection.match
        may_open = self.opens(detection, self.records.all(match))
        return Call(match, self.records(prediction, match, may_open))

    def margin(self, records: Tensor) -> Tensor:
        """How far below λ_t the gate opens, (B,), by the records of the nearest image."""
        margin = torch.full_like(records, self.gate_margin)
        if self.margin_per_doubling == 0:
            return margin
        return margin + self.margin_per_doubling * records.log2()

    def _despecified(
        self,
        prediction: Prediction,
        steering: Call,
        threshold: float,
        held: Tensor,
        rows: Tensor,
        columns: dict[str, Tensor],
    ) -> Prediction:
        """G_spe and G_dup (eq. 13 to 16) of ``rows``; s_1 and s_2 into ``columns``.

        Down to ``least_scale`` where ``held`` (B,) by a repeated image, to 1 elsewhere.
        """
        cond, uncond = prediction.output_cond, prediction.output_uncond
        s_0 = prediction.guidance_scale
        if cond is None or uncond is None or s_0 <= self.least_scale:
            return prediction
        match = steering.match
        least = torch.ones_like(match.sigma[rows]).masked_fill(held[rows], self.least_scale)
        gate = threshold - self.margin(steering.records[rows])
        strength = self.similarity.strength(match.sigma[rows], gate)
        s_1 = corrections.despecification_scale(strength, self.c1, s_0, least)
        s_2 = corrections.deduplication_scale(strength, self.c2, s_0, s_1, least)
        change = corrections.despecification(s_1, cond[rows], uncond[rows])
        if self.c2 > 0:
            neighbour = self._neighbour_output(prediction, match, rows, s_2)
            change = change + corrections.deduplication(s_2, neighbour, uncond[rows])
        columns["s1"][rows], columns["s2"][rows] = s_1, s_2
        # Differences of outputs: the same formula for ε and for v (see Prediction).
        return prediction.with_output_change(change, rows)

    def _g_sim(self, prediction: Prediction, match: Match, rows: Tensor) -> Tensor:
        """G_sim (eq. 17) of ``rows``, shortened to ``max_displacement``."""
        gradient = sigma_gradient(
            prediction, self.index, self.similarity, match.rows[rows], rows, self.gradient
        )
        g_sim = corrections.dissimilarity(self.c3, prediction.alpha_bar, gradient)
        if self.max_displacement is None:
            return g_sim
        return limit_displacement(g_sim, prediction.alpha_bar, self.max_displacement)

    def _neighbour_output(
        self, prediction: Prediction, match: Match, rows: Tensor, s_2: Tensor
    ) -> Tensor:
        """ε_θ(x_t, y_N) of eq. 16; the denoiser is called only where y_N ≠ y and s_2 > 0."""
        assert prediction.output_cond is not None and prediction.conditions is not None
        output = prediction.output_cond[rows].clone()
        places = (s_2 > 0).nonzero().squeeze(1)
        if not len(places):
            return output
        y_n = self.neighbour_conditions(prediction, match, rows[places])
        other = differ(y_n, prediction.conditions[rows[places]]).nonzero().squeeze(1)
        if len(other):
            x_t = prediction.x_t[rows[places[other]]]
            output[places[other]] = prediction.denoise(x_t, y_n[other])
        return output

    def _correct_last(
        self, prediction: Prediction, sigma: Tensor, active: Tensor, target: float
    ) -> Prediction:
        """Move the clean estimates that the sampler is about to return below ``target``.

        Only rows that guidance or the limits of an image changed since ``sigma`` are measured
        again: in latents most have their own σ already, which costs a decoding and an embedding.
        """
        x_0 = prediction.clean_estimate()
        offset, gain = prediction.returned or (torch.zeros_like(x_0), 1.0)
        free = None  # every element follows the prediction
        if isinstance(gain, torch.Tensor):
            free = gain != 0
        if not (gain if free is None else bool(free.any())):
            return prediction  # whatever is predicted, the sampler returns the same
        before = offset + gain * x_0 if prediction.finish is None else prediction.finish(x_0)
        limit = prediction.image_range
        returned = before if limit is None else before.clamp(-limit, limit)
        changed = active | (returned != x_0).flatten(1).any(dim=1)
        if len(again := changed.nonzero().squeeze(1)):
            measured = self.similarity(self.index, prediction.decode(returned[again])).sigma
            sigma = sigma.index_copy(0, again, measured)
        above = sigma > target
        rows = above.nonzero().squeeze(1)
        if not len(rows):
            return prediction
        if prediction.clean_range is not None:
            moved = self._moved_within(prediction, returned, offset, gain, rows, target)
            return prediction.with_clean_change(moved - x_0[rows], rows).activated(above)
        with torch.inference_mode(False):
            moved = move_below(
                self.index,
                self.similarity,
                returned[rows].clone(),
                target,
                limit,
                prediction.decode,
                free=None if free is None else free[rows],
            )
        change = moved - before[rows]
        if isinstance(gain, torch.Tensor):
            change = torch.where(gain[rows] != 0, change / gain[rows], 0.0)
        else:
            change = change / gain
        return prediction.with_clean_change(change, rows).activated(above)

    def _moved_within(
        self,
        prediction: Prediction,
        returned: Tensor,
        offset: Tensor,
        gain: float | Tensor,
        rows: Tensor,
        target: float,
    ) -> Tensor:
        """x̂_0 of ``rows`` in ±clean_range, which the sampler makes samples below ``target`` of."""
        assert prediction.clean_range is not None
        limit = prediction.image_range
        each = torch.as_tensor(gain, device=returned.device).expand_as(returned)[rows]
        # What is moved is gain·x̂_0: there, the range is one number.
        furthest = prediction.clean_range * float(each.abs().max())
        start = (returned[rows] - offset[rows]).clamp(-furthest, furthest)
        with torch.inference_mode(False):
            moved = move_below(
                self.index,
                self.similarity,
                start.clone(),
                target,
                furthest,
                lambda x: prediction.decode(x if limit is None else x.clamp(-limit, limit)),
                offset=offset[rows].clone(),
                free=each != 0,
            )
        return torch.where(each != 0, moved / each, 0.0)
