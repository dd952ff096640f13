"""SteadyAMG: Anti-Memorization Guidance with margin, latch, limit and last correction (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.guidance.amg import AntiMemorizationGuidance
from memfree.guidance.asked_records import AskedRecords
from memfree.guidance.corrections import check_at_least_0, gate
from memfree.guidance.detection import EVERY_STEP, Cadence, Detection, Steering
from memfree.guidance.displacement import limit_displacement, move_below
from memfree.guidance.latch import Call, nearest_call, where
from memfree.guidance.mitigation_names import CAPTION_NEIGHBOURS, CAPTION_RECORDS, Through
from memfree.guidance.neighbour_conditions import NeighbourConditions
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match, Similarity
from memfree.guidance.threshold import ConstantThreshold, ThresholdSchedule

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.options import CaptionPolicy


class SteadyAMG(AntiMemorizationGuidance):
    """AMG with what memfree adds to it; ``recommended`` is this one (docs/method.md says why).

    With the defaults it is the paper's method.

    Args:
        index: references.
        similarity: as of ``AntiMemorizationGuidance``, like ``threshold``, ``c1``, ``c2``, ``c3``.
        threshold: λ_t.
        c1: strength of despecification.
        c2: strength of caption deduplication.
        c3: strength of dissimilarity guidance.
        gate_margin: the gate opens at λ_t − gate_margin, in units of σ.
        max_displacement: G_sim moves x̂_0 by at most this root mean square a step; None: no limit.
        final_correction: move what is still above this σ at the last step just below it;
            None: no correction.
        gradient: as of ``AntiMemorizationGuidance``.
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
        super().__init__(index, similarity, threshold, c1, c2, c3, gradient, cadence)
        check_at_least_0(gate_margin=gate_margin, margin_per_doubling=margin_per_doubling)
        if not 0 <= least_scale <= 1:
            raise ValueError(f"least_scale must be in [0, 1], not {least_scale:g}")
        if max_displacement is not None and max_displacement <= 0:
            raise ValueError(f"max_displacement must be above 0, not {max_displacement:g}")
        self.gate_margin = gate_margin
        self.max_displacement = max_displacement
        self.final_correction = final_correction
        self.gated = gated
        self.margin_per_doubling = margin_per_doubling
        self.least_scale = least_scale
        self.latched = latched
        self.records = AskedRecords(index, caption_bandwidth)
        self.neighbour_conditions = NeighbourConditions(
            index, caption_policy, caption_neighbours, caption_records
        )

    def steering(self, prediction: Prediction, detection: Detection) -> Steering:
        """Samples above λ_t less the margin, and those that a repeated image once held."""
        match, threshold = detection.match, detection.threshold
        may_open = self.opens(detection, self.records.all(match))
        now = Call(match, self.records(prediction, match, may_open))
        near = self.opens(detection, now.records)
        held, call = near & (now.records > 1), now
        if self.latched:
            latch = nearest_call(prediction, self, now, held)
            held = latch.match.sigma.isfinite()
            call = where(latch.match.sigma > match.sigma, latch, now)
        active = near | held
        rows = near_rows = active.nonzero().squeeze(1)
        if self.latched and self.c3 > 0 and len(rows):
            near_rows = near.nonzero().squeeze(1)  # without a latch, all that are active
        return Steering(
            active=active,
            rows=rows,
            near=near_rows,
            match=call.match,
            gate=threshold - self.margin(call.records),
            opens_above=threshold - self.margin(now.records),
            least_scale=torch.where(held, self.least_scale, 1.0),
        )

    def opens(self, detection: Detection, records: Tensor) -> Tensor:
        """The gate of eq. 10 with its margin, (B,) bool; open to all if ``gated`` is False."""
        sigma = detection.match.sigma
        if not self.gated:
            return torch.ones_like(sigma, dtype=torch.bool)
        return gate(sigma, detection.threshold - self.margin(records))

    def margin(self, records: Tensor) -> Tensor:
        """How far below λ_t the gate opens, (B,), by the records of the nearest image."""
        margin = torch.full_like(records, self.gate_margin)
        if self.margin_per_doubling == 0:
            return margin
        return margin + self.margin_per_doubling * records.log2()

    def g_sim(self, prediction: Prediction, match: Match, rows: Tensor) -> Tensor:
        """G_sim (eq. 17), shortened to ``max_displacement``."""
        g_sim = super().g_sim(prediction, match, rows)
        if self.max_displacement is None:
            return g_sim
        return limit_displacement(g_sim, prediction.alpha_bar, self.max_displacement)

    def finish(self, prediction: Prediction, found: Detection, steering: Steering) -> Prediction:
        """The last correction, at the last step."""
        if not prediction.is_last or self.final_correction is None:
            return prediction
        sigma, active = found.match.sigma, steering.active
        return self._correct_last(prediction, sigma, active, self.final_correction)

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
