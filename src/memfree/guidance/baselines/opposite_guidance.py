"""Lower guidance scales: a limit, and opposite guidance (Jain et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memfree.guidance.baselines.options import LowerGuidanceOptions, OppositeGuidanceOptions
from memfree.guidance.baselines.wen_norm import branches, magnitude
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.prediction import Guidance, Prediction


@dataclass(eq=False)
class LowerGuidance(Mitigation):
    """s_0 ← min(s_0, limit), at least 1: guidance sharpens towards what the prompt alone brings."""

    options: LowerGuidanceOptions = field(default_factory=LowerGuidanceOptions)

    def __post_init__(self) -> None:
        if self.options.guidance_scale < 1:
            raise ValueError(
                "--mitigation.guidance_scale must be at least 1, not "
                f"{self.options.guidance_scale:g}"
            )

    def guidance_scale(self, guidance_scale: float) -> float:
        """The smaller of the user's scale and the limit."""
        return min(guidance_scale, self.options.guidance_scale)


@dataclass(eq=False)
class OppositeGuidance(Mitigation):
    """ε̂ = ε_∅ + s·(ε_c − ε_∅) with s ≤ 0 before a transition point, and s = s_0 from there on.

    Source: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause
    Memorization", CVPR 2025, arXiv 2411.16738. As in the authors' program for dynamic points, the
    step that shows d_t > d_{t−1} < d_{t−2}, d = ‖ε_c − ε_∅‖, is the first guided one; a sample
    without such a minimum is never guided. Their opposite dynamic program has another rule
    (docs/baselines.md).
    """

    options: OppositeGuidanceOptions = field(default_factory=OppositeGuidanceOptions)

    def guidances(self) -> list[Guidance]:
        """The guidance that replaces s_0 before the transition."""
        return [_BeforeTransition(self.options)]


class _BeforeTransition:
    calls_denoiser = False

    def __init__(self, options: OppositeGuidanceOptions) -> None:
        self.options = options

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        before = self._before(prediction)
        rows = before.nonzero().squeeze(1)
        if not len(rows):
            return prediction
        cond, uncond = branches(prediction, "opposite guidance (jain)")
        output = prediction.output.clone()
        output[rows] = prediction.combined(cond[rows], uncond[rows], self.options.scale_before)
        return replace(prediction, output=output).activated(before)

    def _before(self, prediction: Prediction) -> Tensor:
        x_t = prediction.x_t
        if self.options.transition == "static":
            before = prediction.time > self.options.transition_time
            return torch.full((len(x_t),), before, device=x_t.device)
        # passed, d_{t−1}, d_{t−2}; a minimum takes three magnitudes (≥ 0), as in theirs.
        never = x_t.new_full((len(x_t),), -1.0, dtype=torch.float32)
        passed, last, before_last = prediction.memory.get(self, (never > 0, never, never))
        current = magnitude(prediction, "opposite guidance (jain)")
        passed = passed | ((current > last) & (before_last > last))
        prediction.memory[self] = passed, current, last
        return ~passed
