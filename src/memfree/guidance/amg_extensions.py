"""SteadyAMG: Anti-Memorization Guidance with margin, latch, limit and last correction (ours)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memfree.conditions import Encode, TextConditions, cosines, sentences
from memfree.diffusion_math import per_sample
from memfree.guidance.amg import AntiMemorizationGuidance
from memfree.guidance.equations import ConstantThreshold, ThresholdSchedule, check_at_least_0, gate
from memfree.guidance.multiplicity import caption_kernel
from memfree.guidance.neighbour_conditions import NeighbourConditions
from memfree.guidance.observer import EVERY_STEP, Cadence, Detection, Steering
from memfree.guidance.options import CAPTION_NEIGHBOURS, CAPTION_RECORDS, Through
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex
    from memfree.retrieval.options import CaptionPolicy

_Known = dict[int, tuple[Tensor, Tensor]]  # By group: its captions' sentence vectors and records


class AskedRecords:
    """m(y) = m − Σ_c (1 − K(y, c))·m_c of the nearest image's group, at least 1.

    m: the group's records; m_c: those with caption c; K: ``caption_kernel``. Other captions did not
    teach the model to answer the prompt with this image; records without one count under every
    prompt, as in ``CaptionWeights``. Without prompts, captions, a text encoder or ``bandwidth``,
    all records count.
    """

    def __init__(self, index: ReferenceIndex, bandwidth: float | None = None) -> None:
        if bandwidth is not None:
            check_at_least_0(caption_bandwidth=bandwidth)
        self.index = index
        self.bandwidth = bandwidth
        self._kept: tuple[Encode | None, _Known] = None, {}

    def __call__(self, prediction: Prediction, match: Match, wanted: Tensor) -> Tensor:
        """m(y) of the nearest image where ``wanted`` (B,) bool, its m elsewhere, (B,) float32."""
        nearest, records = match.rows[:, 0], self.all(match)
        prompts = prediction.conditions
        if self.bandwidth is None or self.index.captions is None:
            return records
        if not isinstance(prompts, TextConditions) or prediction.encode is None:
            return records
        groups = self.index.group.to(nearest.device)[nearest]
        groups, order = torch.where(wanted & (records > 1), groups, -1).sort(stable=True)
        start = 0
        # The host waits for the device once: samples of a group are adjacent in ``order``.
        for group, samples in Counter(groups.tolist()).items():
            same, start = order[start : start + samples], start + samples
            if counts := self.index.items.caption_counts.get(group):
                known, m = self._encoded(prediction, group, counts)
                fit = caption_kernel(cosines(prompts[same].sentence(), known), self.bandwidth)
                records[same] = (records[same] - ((1 - fit) * m).sum(dim=1)).clamp(min=1)
        return records

    def all(self, match: Match) -> Tensor:
        """m of each sample's nearest image, whatever the prompt, (B,) float32."""
        nearest = match.rows[:, 0]
        return self.index.group_multiplicity.to(nearest.device)[nearest].float()

    def _encoded(
        self, prediction: Prediction, group: int, counts: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Sentence vectors (C, D) and records (C,) of a group; threads may use other encoders."""
        encode = prediction.encode
        assert encode is not None
        if self not in prediction.memory:
            encoder, kept = self._kept
            if encoder != encode:
                kept = {}
                self._kept = encode, kept
            prediction.memory[self] = kept
        known: _Known = prediction.memory[self]
        if group not in known:
            vectors = sentences(encode, list(counts))
            records = torch.tensor(list(counts.values()), dtype=torch.float32)
            known[group] = vectors, records.to(vectors.device)
        return known[group]


@dataclass(frozen=True)
class Call:
    """A batch's nearest images, and how often the model saw those under the prompts."""

    match: Match
    records: Tensor  # (B,): m(y) of each nearest image


def nearest_call(prediction: Prediction, owner: object, call: Call, called: Tensor) -> Call:
    """The call at the highest σ while ``called`` (B,): captions stay those of the image left."""
    key = (owner, "nearest call")
    never = torch.full_like(call.match.sigma, -torch.inf)
    before = prediction.memory.get(
        key, Call(Match(never, call.match.rows, call.match.vectors), call.records)
    )
    prediction.memory[key] = where(called & (call.match.sigma > before.match.sigma), call, before)
    return prediction.memory[key]


def where(mask: Tensor, call: Call, other: Call) -> Call:
    """The rows of ``call`` where ``mask`` (B,) is true, those of ``other`` elsewhere."""

    def chosen(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(mask if ours.ndim == 1 else mask[:, None], ours, theirs)

    one, two = call.match, other.match
    match = Match(
        chosen(one.sigma, two.sigma),
        chosen(one.rows, two.rows),
        chosen(one.vectors, two.vectors),
    )
    return Call(match, chosen(call.records, other.records))


def limit_displacement(g_sim: Tensor, alpha_bar: Tensor, max_displacement: float) -> Tensor:
    """Shorten G_sim (B, ...): adding G moves x̂_0 by −√((1−ᾱ)/ᾱ)·G, unbounded towards noise."""
    moved = g_sim.flatten(1).square().mean(dim=1).sqrt() * ((1 - alpha_bar) / alpha_bar).sqrt()
    factor = (max_displacement / moved.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    return per_sample(factor, g_sim) * g_sim


def move_below(
    index: ReferenceIndex,
    similarity: Similarity,
    x_0: Tensor,
    target: float,
    image_range: float | None,
    decode: Callable[[Tensor], Tensor] = lambda x_0: x_0,
    iterations: int = 20,
    offset: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Move clean estimates along −∇σ until every σ is at most ``target``, by Newton steps.

    A step of (σ − target)/‖∇σ‖² is exact where σ is linear; each step searches the neighbour again,
    since another may come near. Rows at or below the target keep their bits.

    Args:
        x_0: (B, ...), images or what ``decode`` turns into images (B, C, H, W) in [−1, 1].
        image_range: keeps x_0 in ±image_range; None: no limit.
        offset: like x_0, added before decoding.
        free: like x_0, bool: elements that may move, such as those that inpainting draws.
    """
    x_0 = x_0.clone()
    rows = torch.arange(len(x_0), device=x_0.device)
    anywhere = _any_direction(x_0)
    for _ in range(iterations):
        with torch.enable_grad():
            moving = x_0[rows].requires_grad_()
            sample = moving if offset is None else moving + offset[rows]
            sigma = similarity(index, decode(sample)).sigma
            (gradient,) = torch.autograd.grad(sigma.sum(), moving)
        above = (sigma.detach() > target).nonzero().squeeze(1)
        if not len(above):
            break
        rows, gradient, excess = rows[above], gradient[above], sigma.detach()[above] - target
        if free is not None:
            gradient = gradient * free[rows]
        gradient = _never_zero(gradient, anywhere)
        if image_range is not None:
            # Pixels at the edge of the range cannot move outwards: the others must.
            outwards = (x_0[rows] * -gradient.sign()) >= image_range
            gradient = _never_zero(gradient.masked_fill(outwards, 0.0), anywhere)
        square = gradient.flatten(1).square().sum(dim=1)
        # 1 % past the target, so that rounding does not leave a sample at it.
        step = per_sample((excess + 0.01 * abs(target)) / square, gradient) * gradient
        if free is not None:
            step = step * free[rows]
        moved = x_0[rows] - step
        x_0[rows] = moved if image_range is None else moved.clamp(-image_range, image_range)
    return x_0


def _any_direction(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randn(like.shape[1:], generator=generator, dtype=torch.float32).to(like)
    return anywhere / anywhere.norm()


def _never_zero(gradient: Tensor, anywhere: Tensor) -> Tensor:
    """The gradient, or any direction where it is 0: on top of a reference all lead away."""
    zero = per_sample(gradient.flatten(1).abs().amax(dim=1) < 1e-6, gradient)
    return torch.where(zero, anywhere, gradient)


class SteadyAMG(AntiMemorizationGuidance):
    """AMG with memfree's additions (docs/method.md gives the reasons); ``recommended`` builds it.

    The defaults are the paper's method.

    Args:
        gate_margin: the gate opens at λ_t − gate_margin, in units of σ.
        max_displacement: the most that G_sim moves x̂_0 per step (rms); None: no limit.
        final_correction: the last step moves what is still above this σ just below it; None: off.
        gated: False opens the gate to every sample at every step (ablation of eq. 10). Below λ_t,
            ``NormalizedL2`` then has G_sim alone: c_1 and c_2 multiply an excess of σ_t that is 0.
        margin_per_doubling: adds margin_per_doubling·log_2 m to the margin, with m records of the
            nearest image: the more often the model saw it, the earlier a sample heads for a copy.
        least_scale: what despecification and deduplication leave of s_0 at least near a repeated
            image. 1 (paper): the conditional prediction, for a prompt of one memorized image that
            image; 0: down to the unconditional one.
        latched: a sample whose gate a repeated image opened keeps G_spe and G_dup, at the highest σ
            so far, to the end; otherwise its prompt calls it back when the gate closes.
        caption_bandwidth: m counts the records that fit the prompt (``AskedRecords``); None: all.
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
        """Steer samples above λ_t less the margin, and those latched to a repeated image."""
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
        """How far below λ_t the gate opens, (B,), by the nearest image's records."""
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
        """Apply the final correction at the last step."""
        if not prediction.is_last or self.final_correction is None:
            return prediction
        return self._correct_last(
            prediction, found.match.sigma, steering.active, self.final_correction
        )

    def _correct_last(
        self, prediction: Prediction, sigma: Tensor, active: Tensor, target: float
    ) -> Prediction:
        """Move returned rows below ``target``; measure only changed ones: decoding is costly."""
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

        def below(
            start: Tensor, within: float | None, offset: Tensor | None = None, **options: Any
        ) -> Tensor:
            with torch.inference_mode(False):
                start, offset = start.clone(), None if offset is None else offset.clone()
                return move_below(
                    self.index, self.similarity, start, target, within, offset=offset, **options
                )

        if prediction.clean_range is None:
            movable = None if free is None else free[rows]
            moved = below(returned[rows], limit, decode=prediction.decode, free=movable)
            change = moved - before[rows]
            if isinstance(gain, torch.Tensor):
                change = torch.where(gain[rows] != 0, change / gain[rows], 0.0)
            else:
                change = change / gain
            return prediction.with_clean_change(change, rows).activated(above)

        # x̂_0 stays in ±clean_range; gain·x̂_0 is moved, where the range is one number.
        each = torch.as_tensor(gain, device=returned.device).expand_as(returned)[rows]
        furthest = prediction.clean_range * float(each.abs().max())
        moved = below(
            (returned[rows] - offset[rows]).clamp(-furthest, furthest),
            furthest,
            offset[rows],
            decode=lambda x: prediction.decode(x if limit is None else x.clamp(-limit, limit)),
            free=each != 0,
        )
        change = torch.where(each != 0, moved / each, 0.0) - x_0[rows]
        return prediction.with_clean_change(change, rows).activated(above)
