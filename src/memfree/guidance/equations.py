"""Equations 10 to 19 of Chen, Liu and Xu (CVPR 2024), in their order.

Eq. 8 and 9 are in ``similarity.py``, eq. 10 is summed in ``amg.py``, eq. 11 is the sampler's step,
eq. 12 (the clean estimate) is ``diffusion_math.predicted_x_0``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memfree.diffusion_math import per_sample, predicted_x_0
from memfree.guidance.options import Through
from memfree.guidance.prediction import Prediction
from memfree.guidance.similarity import Similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex

GRID_STEPS = 250  # The paper counts t on a grid of 250 sampling steps; others are mapped onto it


def gate(sigma: Tensor, threshold: float | Tensor) -> Tensor:
    """1{σ_t > λ_t} of eq. 10: which samples are guided at this step, (B,) bool."""
    return sigma > threshold


def despecification_scale(
    strength: Tensor, c_1: float, guidance_scale: float, least_scale: float | Tensor = 1.0
) -> Tensor:
    """s_1 = clip(c_1·σ_t, 0, s_0 − 1) (eq. 13), (B,); 0 where s_0 ≤ 1.

    ``strength`` (B,) is the similarity's form of σ_t; ``least_scale`` stands for the 1 of s_0 − 1.
    """
    most = (guidance_scale - torch.as_tensor(least_scale).to(strength)).clamp(min=0)
    return torch.minimum((c_1 * strength).clamp(min=0), most)


def despecification(s_1: Tensor, eps_cond: Tensor, eps_uncond: Tensor) -> Tensor:
    """G_spe = −s_1·(ε_θ(x_t, y) − ε_θ(x_t)) (eq. 14)."""
    return -per_sample(s_1, eps_cond) * (eps_cond - eps_uncond)


def deduplication_scale(
    strength: Tensor,
    c_2: float,
    guidance_scale: float,
    s_1: Tensor,
    least_scale: float | Tensor = 1.0,
) -> Tensor:
    """s_2 = clip(c_2·σ_t, 0, s_0 − s_1 − 1) (eq. 15); 0 where nothing of s_0 is left."""
    most = (guidance_scale - s_1 - least_scale).clamp(min=0)
    return torch.minimum((c_2 * strength).clamp(min=0), most)


def deduplication(s_2: Tensor, eps_neighbour: Tensor, eps_uncond: Tensor) -> Tensor:
    """G_dup = −s_2·(ε_θ(x_t, y_N) − ε_θ(x_t)) (eq. 16), y_N the nearest image's condition."""
    return -per_sample(s_2, eps_neighbour) * (eps_neighbour - eps_uncond)


def dissimilarity(c_3: float, alpha_bar: Tensor, sigma_gradient: Tensor) -> Tensor:
    """G_sim = c_3·√(1−ᾱ_t)·∇_{x_t} σ_t (eq. 17)."""
    return c_3 * per_sample((1 - alpha_bar).sqrt(), sigma_gradient) * sigma_gradient


def sigma_gradient(
    prediction: Prediction,
    index: ReferenceIndex,
    similarity: Similarity,
    neighbours: Tensor,
    rows: Tensor,
    through: Through,
) -> Tensor:
    """∇_{x_t} σ_t of ``rows`` (n,) against ``neighbours`` (n, k) of the index, (n, ...) float32."""
    with torch.inference_mode(False), torch.enable_grad():
        neighbours = neighbours.clone()
        if through == "denoiser":
            x_t = prediction.x_t[rows].clone().requires_grad_()
            x_0 = _clean_estimate_of(prediction, x_t, rows)
        else:
            x_t = x_0 = prediction.clean_estimate(rows).clone().requires_grad_()
        sigma = similarity.against(index, prediction.decode(x_0), neighbours)
        (gradient,) = torch.autograd.grad(sigma.sum(), x_t)
    if through == "denoiser":
        return gradient.float()
    # With ε̂ constant, ∂x̂_0/∂x_t = 1/√ᾱ (eq. 12), in every parameterisation.
    return gradient / prediction.alpha_bar.sqrt()


def _clean_estimate_of(prediction: Prediction, x_t: Tensor, rows: Tensor) -> Tensor:
    cond = uncond = None
    if prediction.output_cond is not None and prediction.conditions is not None:
        cond = prediction.denoise(x_t, prediction.conditions[rows])
    if prediction.output_uncond is not None:
        uncond = prediction.denoise(x_t, None)
    output = prediction.combined(cond, uncond)
    alpha_bar = prediction.alpha_bar.clone()
    return predicted_x_0(x_t.float(), output.float(), alpha_bar, prediction.prediction_type)


@dataclass(frozen=True)
class ThresholdSchedule:
    """λ_t = a + (b − a)·exp(−c·t), with t = 250·timestep / number of training timesteps (eq. 19).

    The paper's values for nL2 are a = −1.95, b = −1.5, c = 0.025.
    """

    start: float  # a: the value towards pure noise
    end: float  # b: the value at t = 0
    rate: float = 0.025  # c, above 0, per step of the 250-step grid

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate of the threshold must be above 0, not {self.rate:g}")

    def __call__(self, time: float) -> float:
        """λ at ``time`` in [0, 1], 1 being pure noise."""
        return self.start + (self.end - self.start) * math.exp(-self.rate * GRID_STEPS * time)


@dataclass(frozen=True)
class ConstantThreshold:
    """The same λ at every t: the paper's ablation of eq. 19."""

    value: float

    def __call__(self, time: float) -> float:
        """λ, whatever the time."""
        return self.value


def check_at_least_0(**strengths: float) -> None:
    """Refuse negative values, by name."""
    for name, value in strengths.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, not {value:g}")
