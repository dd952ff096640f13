"""The three guidances of AMG and its gate, eq. 10 and 13 to 17, each as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from memfree.diffusion_math import per_sample


def gate(sigma: Tensor, threshold: float | Tensor) -> Tensor:
    """1{σ_t > λ_t} of eq. 10: which samples are guided at this step, (B,) bool."""
    return sigma > threshold


def despecification_scale(
    strength: Tensor, c_1: float, guidance_scale: float, least_scale: float | Tensor = 1.0
) -> Tensor:
    """s_1 = clip(c_1·σ_t, 0, s_0 − 1) (eq. 13); 0 where s_0 ≤ 1.

    Args:
        strength: (B,), what the similarity makes of σ_t (``Similarity.strength``).
        c_1: the paper's constant.
        guidance_scale: s_0 of classifier-free guidance.
        least_scale: what s_1 leaves of s_0 at least, for all or (B,): 1 in the paper, the
            conditional prediction.
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


def check_at_least_0(**strengths: float) -> None:
    """Refuse a negative strength by its name."""
    for name, value in strengths.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, not {value:g}")
