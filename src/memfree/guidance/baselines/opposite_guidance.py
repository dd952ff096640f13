"""Guidance scales below the usual: a lower one, and opposite guidance (Jain et al., 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memfree.guidance.baselines.options import LowerGuidanceOptions, OppositeGuidanceOptions
from memfree.guidance.baselines.wen_norm import branches, magnitude
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.prediction import Guidance, Prediction


class LowerGuidance(Mitigation):
    """s_0 ← min(s_0, limit): guidance sharpens towards what the prompt alone brings.

    Args:
        options: the limit.

    Raises:
        ValueError: it is below 1.
    """

    def __init__(
        self,
        options: LowerGuidanceOptions = LowerGuidanceOptions(),  # noqa: B008 - read only
    ) -> None:
        if options.guidance_scale < 1:
            raise ValueError(
                f"--mitigation.guidance_scale must be at least 1, not {options.guidance_scale:g}"
            )
        self.options = options

    def guidance_scale(self, guidance_scale: float) -> float:
        """The smaller of the user's scale and the limit."""
        return min(guidance_scale, self.options.guidance_scale)


class OppositeGuidance(Mitigation):
    """ε̂ = ε_∅ + s·(ε_c − ε_∅) with s ≤ 0 before a transition point, and s = s_0 from there on.

    Source: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause
    Memorization", CVPR 2025, arXiv 2411.16738: static and dynamic transition points, opposite
    guidance. As in the authors' program for the dynamic one, the step at which
    d_t > d_{t−1} < d_{t−2} shows, with d = ‖ε_c − ε_∅‖, is the first guided one; a sample without
    such a minimum is never guided. Their program for opposite and dynamic has another rule, in a
    run of its own before sampling (docs/baselines.md); here the rule is the same for every scale.

    Args:
        options: transition and scale.
    """

    def __init__(
        self,
        options: OppositeGuidanceOptions = OppositeGuidanceOptions(),  # noqa: B008 - read only
    ) -> None:
        self.options = options

    def guidances(self) -> list[Guidance]:
        """The guidance that replaces s_0 before the transition."""
        return [_BeforeTransition(self.options)]


class _Passed:
    """Which samples have passed the transition, and the last two magnitudes of each, (B,)."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.passed = torch.zeros(batch, dtype=torch.bool, device=device)
        # As in the authors' program: no minimum before there are three magnitudes, which are ≥ 0.
        self.last = torch.full((batch,), -1.0, dtype=torch.float32, device=device)
        self.second_last = torch.full((batch,), -1.0, dtype=torch.float32, device=device)

    def update(self, current: Tensor) -> Tensor:
        """Take the magnitudes of this step; returns which samples have passed."""
        self.passed = self.passed | ((current > self.last) & (self.second_last > self.last))
        self.second_last, self.last = self.last, current
        return self.passed


class _BeforeTransition:
    """Recombines the branches with another scale in the samples before their transition."""

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
        """(B,) bool: samples that have not reached their transition."""
        x_t = prediction.x_t
        if self.options.transition == "static":
            before = prediction.time > self.options.transition_time
            return torch.full((len(x_t),), before, device=x_t.device)
        state = prediction.memory.setdefault(self, _Passed(len(x_t), x_t.device))
        return ~state.update(magnitude(prediction, "opposite guidance (jain)"))
