"""Wen's detection baseline: ‖ε_c − ε_∅‖ at the first steps."""

from __future__ import annotations

import torch
from torch import Tensor

from memfree.guidance.baselines.magnitude import magnitude
from memfree.guidance.mitigation import Start
from memfree.guidance.prediction import Prediction, row_norm


@torch.no_grad()
def wen_norm(start: Start) -> Tensor:
    """‖ε_θ(x_T, y) − ε_θ(x_T)‖ of each sample before sampling, (B,) float32.

    Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models",
    ICLR 2024, arXiv 2407.21720, the detection metric with one step. Higher: more likely memorized.
    """
    return row_norm(start.eps_difference(start.noise, start.conditions))


class WenNorm:
    """Observes the mean of ‖ε_c − ε_∅‖ over the first steps, and changes nothing.

    Source: Wen et al., arXiv 2407.21720 (1, 10 or 50 steps; they also average over images of one
    prompt). It is recorded as ``wen_norm`` in the trace of a prediction, and kept for the batch
    that was sampled last.

    Args:
        steps: how many steps, from the first.
    """

    calls_denoiser = False

    def __init__(self, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps = steps
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, prediction: Prediction) -> Prediction:
        """Record the mean so far."""
        if prediction.step == 0:
            self._norms = []
        if prediction.step < self.steps:
            self._norms.append(magnitude(prediction, "Wen's norm"))
        return prediction.recorded(wen_norm=self.score())

    def score(self) -> Tensor:
        """(B,) of the last batch.

        Raises:
            ValueError: nothing was sampled yet.
        """
        if not self._norms:
            raise ValueError("Wen's norm has seen no prediction yet")
        return torch.stack(self._norms).mean(dim=0)
