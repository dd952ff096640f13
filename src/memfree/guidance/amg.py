"""Anti-Memorization Guidance as published (Chen, Liu, Xu, CVPR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree import guidance
from memfree.data.split import DEFAULT_RATE
from memfree.guidance.equations import (
    ConstantThreshold,
    ThresholdSchedule,
    check_at_least_0,
    deduplication,
    deduplication_scale,
    despecification,
    despecification_scale,
    dissimilarity,
    gate,
    sigma_gradient,
)
from memfree.guidance.neighbour_conditions import NeighbourConditions
from memfree.guidance.observer import EVERY_STEP, Cadence, Detection, Observer, Steering, recorded
from memfree.guidance.options import Through
from memfree.guidance.prediction import Prediction, row_norm
from memfree.guidance.similarity import Match, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


class AntiMemorizationGuidance(Observer):
    """ε̂ ← ε̂ + 1{σ_t > λ_t}·(G_spe + G_dup + G_sim), for each sample (eq. 10).

    Args:
        similarity: ``NormalizedL2`` (eq. 8) or ``EmbeddingSimilarity`` (eq. 9).
        threshold: λ_t as a function of time in [0, 1] (eq. 19).
        c1: strength of despecification (eq. 13); like c2 and c3, 0 switches it off.
        c2: strength of caption deduplication (eq. 15).
        c3: strength of dissimilarity guidance (eq. 17).
        gradient: take ∇_{x_t} σ_t through x̂_0 with ε̂ held constant, or through the denoiser too.
    """

    least_scale = 1.0  # What G_spe and G_dup leave of s_0 at least (eq. 13, 15)

    def __init__(
        self,
        index: ReferenceIndex,
        similarity: Similarity,
        threshold: ThresholdSchedule | ConstantThreshold,
        c1: float = 0.0,
        c2: float = 0.0,
        c3: float = 0.0,
        gradient: Through = "clean_estimate",
        cadence: Cadence = EVERY_STEP,
    ) -> None:
        super().__init__(index, similarity, threshold, cadence)
        check_at_least_0(c1=c1, c2=c2, c3=c3)
        self.c1, self.c2, self.c3, self.gradient = c1, c2, c3, gradient
        self.neighbour_conditions = NeighbourConditions(index)

    @classmethod
    def recommended(
        cls, index: ReferenceIndex, false_positive_rate: float = DEFAULT_RATE
    ) -> AntiMemorizationGuidance:
        """``SteadyAMG`` with the settings of docs/method.md on the index's calibrated threshold."""
        return guidance.GuidanceSettings("amg", false_positive_rate).anti_memorization(index)

    @property
    def needs_text_encoder(self) -> bool:
        """Whether captions are encoded to steer away from them (eq. 15), where s_0 is above 1."""
        return self.c2 > 0

    @property
    def calls_denoiser(self) -> bool:
        """Whether the denoiser may be called: for y_N (eq. 16), or for its gradient (eq. 17)."""
        return self.c2 > 0 or (self.c3 > 0 and self.gradient == "denoiser")

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        """Correct the active rows (eq. 10); all others keep their bits."""
        detection = self.detect(prediction)  # σ_t of x̂_0 (eq. 8, 9, 12), λ_t (eq. 19)
        steering = self.steering(prediction, detection)  # 1{σ_t > λ_t}
        detected = recorded(prediction, detection, steering)
        guided = self.add_spe_and_dup(detected, steering)  # + G_spe + G_dup
        if self.c3 > 0 and len(rows := steering.near):
            g_sim = self.g_sim(detected, detection.match, rows)
            norm = row_norm(g_sim)
            guided = guided.with_eps_change(g_sim, rows).recorded_at(rows, g_sim_norm=norm)
        return self.finish(guided, detection, steering)

    def steering(self, prediction: Prediction, detection: Detection) -> Steering:
        """Steer samples above λ_t (eq. 10), away from their nearest image."""
        threshold = torch.full_like(detection.match.sigma, detection.threshold)
        active = gate(detection.match.sigma, threshold)
        rows = active.nonzero().squeeze(1)
        ones = torch.ones_like(threshold)
        return Steering(active, rows, rows, detection.match, threshold, threshold, ones)

    def add_spe_and_dup(self, prediction: Prediction, steering: Steering) -> Prediction:
        """ε̂ + G_spe + G_dup (eq. 13 to 16)."""
        cond, uncond = prediction.output_cond, prediction.output_uncond
        s_0, rows = prediction.guidance_scale, steering.rows
        if cond is None or uncond is None or s_0 <= self.least_scale or not len(rows):
            return prediction
        least = steering.least_scale[rows]
        strength = self.similarity.strength(steering.match.sigma[rows], steering.gate[rows])
        s_1 = despecification_scale(strength, self.c1, s_0, least)
        s_2 = deduplication_scale(strength, self.c2, s_0, s_1, least)
        change = despecification(s_1, cond[rows], uncond[rows])
        if self.c2 > 0:
            neighbour = self.neighbour_conditions.output(prediction, steering.match, rows, s_2)
            change = change + deduplication(s_2, neighbour, uncond[rows])
        # Differences of outputs: the same formula for ε and for v (see Prediction).
        return prediction.with_output_change(change, rows).recorded_at(rows, s1=s_1, s2=s_2)

    def g_sim(self, prediction: Prediction, match: Match, rows: Tensor) -> Tensor:
        """G_sim (eq. 17) of ``rows``; the gradient is taken at x̂_0 as detected."""
        of, through = match.rows[rows], self.gradient
        gradient = sigma_gradient(prediction, self.index, self.similarity, of, rows, through)
        return dissimilarity(self.c3, prediction.alpha_bar, gradient)

    def finish(self, prediction: Prediction, found: Detection, steering: Steering) -> Prediction:
        """A hook after the correction; the paper does nothing here."""
        return prediction
