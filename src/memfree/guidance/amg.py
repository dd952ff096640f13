"""Anti-Memorization Guidance (Chen, Liu, Xu, CVPR 2024): detect, gate, and steer away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from memfree.calibration_size import DEFAULT_RATE
from memfree.conditions import Conditions, TextConditions, differ
from memfree.diffusion_math import predicted_x_0
from memfree.guidance import corrections
from memfree.guidance.detection import EVERY_STEP, Cadence, Detection, Observer, recorded
from memfree.guidance.displacement import limit_displacement, move_below
from memfree.guidance.prediction import Prediction, combine, row_norm
from memfree.guidance.similarity import Match, Similarity
from memfree.guidance.threshold import ConstantThreshold, ThresholdSchedule

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class AntiMemorizationGuidance(Observer):
    """ε̂ ← ε̂ + 1{σ_t > λ_t}·(G_spe + G_dup + G_sim), per sample (eq. 8 to 19).

    With the defaults this is the paper's method and no more. ``gate_margin``,
    ``max_displacement`` and ``final_correction`` are ours (docs/method.md says why);
    ``AntiMemorizationGuidance.recommended`` switches them on.

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
        cadence: when neighbours are searched; see ``Cadence``.
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
        gradient: Literal["clean_estimate", "denoiser"] = "clean_estimate",
        gated: bool = True,
        cadence: Cadence = EVERY_STEP,
    ) -> None:
        super().__init__(index, similarity, threshold, cadence)
        for name, value in (("c1", c1), ("c2", c2), ("c3", c3), ("gate_margin", gate_margin)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value:g}")
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

    @classmethod
    def recommended(
        cls, index: ReferenceIndex, false_positive_rate: float = DEFAULT_RATE
    ) -> AntiMemorizationGuidance:
        """The settings that docs/method.md explains, on the index's calibrated threshold."""
        from memfree.guidance.settings import GuidanceSettings

        return GuidanceSettings(
            mitigation="amg", false_positive_rate=false_positive_rate
        ).anti_memorization(index)

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        """Correct the active rows; all others keep their bits."""
        detection = self.detect(prediction)
        sigma = detection.match.sigma
        active = self.opens(sigma, detection.threshold)
        prediction = recorded(prediction, detection).activated(active)
        rows = active.nonzero().squeeze(1)
        zeros = torch.zeros_like(sigma)
        columns = {"s1": zeros.clone(), "s2": zeros.clone(), "g_sim_norm": zeros.clone()}
        if len(rows):
            prediction = self._guide(prediction, detection, rows, columns)
        if prediction.is_last and self.final_correction is not None:
            prediction = self._correct_last(prediction, sigma, active, self.final_correction)
        return prediction.recorded(**columns)

    def opens(self, sigma: Tensor, threshold: float) -> Tensor:
        """The gate of eq. 10 with its margin, (B,) bool; open to all if ``gated`` is False."""
        if not self.gated:
            return torch.ones_like(sigma, dtype=torch.bool)
        return corrections.gate(sigma, threshold - self.gate_margin)

    def _guide(
        self, prediction: Prediction, detection: Detection, rows: Tensor, columns: dict[str, Tensor]
    ) -> Prediction:
        """Eq. 10 on the active rows; writes the strengths that were used into ``columns``."""
        match = detection.match
        gate = torch.tensor(detection.threshold - self.gate_margin, device=match.sigma.device)
        strength = self.similarity.strength(match.sigma[rows], gate)
        s_0 = prediction.guidance_scale
        s_1 = corrections.despecification_scale(strength, self.c1, s_0)
        s_2 = corrections.deduplication_scale(strength, self.c2, s_0, s_1)
        cond, uncond = prediction.output_cond, prediction.output_uncond
        result = prediction
        if cond is not None and uncond is not None and s_0 > 1:
            change = corrections.despecification(s_1, cond[rows], uncond[rows])
            if self.c2 > 0:
                neighbour = self._neighbour_output(prediction, match, rows, s_2)
                change = change + corrections.deduplication(s_2, neighbour, uncond[rows])
            # Differences of outputs: the same formula for ε and for v (see Prediction).
            result = result.with_output_change(change, rows)
            columns["s1"][rows], columns["s2"][rows] = s_1, s_2
        if self.c3 > 0:
            g_sim = corrections.dissimilarity(
                self.c3, prediction.alpha_bar, self._sigma_gradient(prediction, match, rows)
            )
            if self.max_displacement is not None:
                g_sim = limit_displacement(g_sim, prediction.alpha_bar, self.max_displacement)
            result = result.with_eps_change(g_sim, rows)
            columns["g_sim_norm"][rows] = row_norm(g_sim)
        return result

    def _neighbour_output(
        self, prediction: Prediction, match: Match, rows: Tensor, s_2: Tensor
    ) -> Tensor:
        """ε_θ(x_t, y_N) of eq. 16; the denoiser is called only where y_N ≠ y and s_2 > 0."""
        assert prediction.output_cond is not None and prediction.conditions is not None
        y_n = self._neighbour_conditions(prediction, match, rows)
        output = prediction.output_cond[rows].clone()
        other = (differ(y_n, prediction.conditions[rows]) & (s_2 > 0)).nonzero().squeeze(1)
        if len(other):
            output[other] = prediction.denoise(prediction.x_t[rows[other]], y_n[other])
        return output

    def _neighbour_conditions(
        self, prediction: Prediction, match: Match, rows: Tensor
    ) -> Conditions:
        """y_N: the label or the encoded caption of the nearest image, one a row of ``rows``."""
        if not isinstance(prediction.conditions, TextConditions):
            if self.index.labels is None:
                raise ValueError("c2 needs an index with labels: build it on a labelled data set")
            return self.index.labels.to(match.rows.device)[match.rows[rows, 0]]
        if self.index.captions is None or prediction.encode is None:
            raise ValueError(
                "c2 needs the caption of the nearest image and a text encoder: build the index on "
                "a captioned data set, or set c2 to 0"
            )
        captions = [self.index.captions[row] for row in match.rows[rows, 0].tolist()]
        known = prediction.memory.setdefault((self, "captions"), {})
        if new := [text for text in dict.fromkeys(captions) if text not in known]:
            encoded = prediction.encode(new)
            assert isinstance(encoded, TextConditions)
            known.update({text: encoded[slice(i, i + 1)] for i, text in enumerate(new)})
        return TextConditions.cat([known[text] for text in captions])

    def _sigma_gradient(self, prediction: Prediction, match: Match, rows: Tensor) -> Tensor:
        """∇_{x_t} σ_t (len(rows), ...) in float32; the neighbours are not differentiated."""
        with torch.inference_mode(False), torch.enable_grad():
            neighbours = match.rows[rows].clone()
            if self.gradient == "denoiser":
                x_t = prediction.x_t[rows].clone().requires_grad_()
                x_0 = _clean_estimate_of(prediction, x_t, rows)
            else:
                x_t = x_0 = prediction.clean_estimate(rows).clone().requires_grad_()
            sigma = self.similarity.against(self.index, prediction.decode(x_0), neighbours)
            (gradient,) = torch.autograd.grad(sigma.sum(), x_t)
        if self.gradient == "denoiser":
            return gradient.float()
        # With ε̂ constant, ∂x̂_0/∂x_t = 1/√ᾱ (eq. 12), in every parameterisation.
        return gradient / prediction.alpha_bar.sqrt()

    def _correct_last(
        self, prediction: Prediction, sigma: Tensor, active: Tensor, target: float
    ) -> Prediction:
        """Move the clean estimates that the sampler is about to return below ``target``.

        Only rows that guidance or the limits of an image changed since ``sigma`` are measured
        again: in latents most have their own σ already, which costs a decoding and an embedding.
        """
        x_0 = prediction.clean_estimate()
        offset, gain = prediction.returned or (torch.zeros_like(x_0), 1.0)
        before = offset + gain * x_0
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
        with torch.inference_mode(False):
            moved = move_below(
                self.index,
                self.similarity,
                returned[rows].clone(),
                target,
                limit,
                prediction.decode,
            )
        return prediction.with_clean_change((moved - before[rows]) / gain, rows).activated(above)


def _clean_estimate_of(prediction: Prediction, x_t: Tensor, rows: Tensor) -> Tensor:
    """x̂_0 of other noisy samples at this step, by calling the denoiser on both branches again."""
    cond = uncond = None
    if prediction.output_cond is not None and prediction.conditions is not None:
        cond = prediction.denoise(x_t, prediction.conditions[rows])
    if prediction.output_uncond is not None:
        uncond = prediction.denoise(x_t, None)
    output = combine(cond, uncond, prediction.guidance_scale)
    alpha_bar = prediction.alpha_bar.clone()
    return predicted_x_0(x_t.float(), output.float(), alpha_bar, prediction.prediction_type)
