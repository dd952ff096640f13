"""Observer: σ_t beside λ_t at every step, and how often neighbours are searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.guidance.equations import ConstantThreshold, ThresholdSchedule
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Match, Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


@dataclass(frozen=True)
class Cadence:
    """Steps at which neighbours are searched: every n-th, and every one near the end.

    Fewer searches are cheaper where decoding and embedding dominate a step (latents), but guidance
    may begin n − 1 steps late, and an active sample moves away from the last neighbour found.
    """

    every: int = 1  # n: search at steps 0, n, 2n, ...
    always_below: float = 0.3  # Search at every step from this time on (1 is noise, 0 the image)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"cadence every {self.every}: use 1 or more")

    def searches(self, prediction: Prediction) -> bool:
        """Whether neighbours are searched at this step."""
        late = prediction.time <= self.always_below or prediction.is_last
        return late or prediction.step % self.every == 0


EVERY_STEP = Cadence()


@dataclass(frozen=True)
class Detection:
    """σ_t beside λ_t of this step, before any change."""

    match: Match
    threshold: float


@dataclass(frozen=True)
class Steering:
    """Which samples of a batch are steered at a step, and away from what (eq. 10)."""

    active: Tensor  # (B,) bool: 1{σ_t > λ_t}
    rows: Tensor  # The active rows, int64: G_spe and G_dup act on them
    near: Tensor  # Rows that G_sim acts on; in the paper the active ones
    match: Match  # What G_spe and G_dup steer away from; in the paper this step's nearest image
    gate: Tensor  # (B,): the σ above which the gate opened to ``match``; λ_t in the paper
    opens_above: Tensor  # (B,): the σ above which the gate opens at this step; λ_t in the paper
    least_scale: Tensor  # (B,): what G_spe and G_dup leave of s_0 at least; 1 in the paper


class Observer:
    """Record σ_t and λ_t (a function of time in [0, 1]) as AMG detects them, changing nothing."""

    @property
    def calls_denoiser(self) -> bool:
        """Whether the denoiser may be called again; assumed of guidances without this."""
        return False

    def __init__(
        self,
        index: ReferenceIndex,
        similarity: Similarity,
        threshold: ThresholdSchedule | ConstantThreshold,
        cadence: Cadence = EVERY_STEP,
    ) -> None:
        self.index = index
        self.similarity = similarity
        self.threshold = threshold
        self.cadence = cadence

    @torch.no_grad()
    def detect(self, prediction: Prediction) -> Detection:
        """Match x̂_0 (eq. 8, 9, 12); between two searches (``cadence``) the last match stands."""
        memory = prediction.memory
        if self not in memory or self.cadence.searches(prediction):
            images = prediction.decode(prediction.clean_estimate())
            memory[self] = self.similarity(self.index, images)
        return Detection(memory[self], self.threshold(prediction.time))

    def __call__(self, prediction: Prediction) -> Prediction:
        """Record σ, λ and the nearest row."""
        return recorded(prediction, self.detect(prediction))


def recorded(
    prediction: Prediction, detection: Detection, steering: Steering | None = None
) -> Prediction:
    """The record with σ_t, λ_t, the nearest row and what is steered in its trace."""
    sigma = detection.match.sigma
    columns = {"sigma": sigma, "lambda": torch.full_like(sigma, detection.threshold)}
    columns["nearest"] = detection.match.rows[:, 0]
    if steering is None:
        return prediction.recorded(**columns)
    nothing = dict.fromkeys(("s1", "s2", "g_sim_norm"), torch.zeros_like(sigma))
    steered = prediction.activated(steering.active)
    return steered.recorded(**columns, **nothing, gate=steering.opens_above)
