"""Wen's detection baseline: ‖ε_c − ε_∅‖ at the first steps."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor

from memfree.diffusion_math import eps_change
from memfree.guidance.mitigation import Start
from memfree.guidance.prediction import Prediction, row_norm


def size_factor(shape: tuple[int, ...], per_element: bool) -> float:
    """√(elements of a sample (C, H, W) / 16384), for lengths tuned on SD 1.4's latents."""
    return sqrt(prod(shape) / (4 * 64 * 64)) if per_element else 1.0


def magnitude(prediction: Prediction, method: str) -> Tensor:
    """‖ε_θ(x_t, y) − ε_θ(x_t)‖ of each sample, (B,) float32; ``method`` is named in errors."""
    cond, uncond = branches(prediction, method)
    return eps_norm(prediction, cond.float() - uncond.float())


def eps_norm(prediction: Prediction, change: Tensor) -> Tensor:
    """‖Δε‖ of a change (b, ...) of the denoiser's output at this step, (b,) float32."""
    return row_norm(eps_change(change.float(), prediction.alpha_bar, prediction.prediction_type))


def branches(prediction: Prediction, method: str) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional branch; refuses a prediction of one branch."""
    if prediction.output_cond is None or prediction.output_uncond is None:
        raise ValueError(f"{method} needs classifier-free guidance: --guidance_scale above 1")
    return prediction.output_cond, prediction.output_uncond


@torch.no_grad()
def wen_norm(start: Start) -> Tensor:
    """‖ε_θ(x_T, y) − ε_θ(x_T)‖ before sampling, (B,) float32; higher: more likely memorized.

    Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models",
    ICLR 2024, arXiv 2407.21720, the detection metric with one step.
    """
    return row_norm(start.eps_difference(start.noise, start.conditions))


class WenNorm:
    """Observes the mean of ‖ε_c − ε_∅‖ over the first ``steps``, and changes nothing.

    Source: Wen et al., arXiv 2407.21720 (1, 10 or 50 steps; they also average over a prompt's
    images). The mean is in the trace as ``wen_norm``, and kept for the last batch.
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
        """The mean (B,) of the last batch; ValueError before any."""
        if not self._norms:
            raise ValueError("Wen's norm has seen no prediction yet")
        return torch.stack(self._norms).mean(dim=0)
