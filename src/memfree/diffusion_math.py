"""ε, v and x_0 predictions, and the noise level at a step of any diffusers scheduler."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
SMALLEST_ALPHA_BAR = 2.0**-40
"""Replaces ᾱ = 0 (zero terminal SNR), where ε̂ cannot change x̂_0: below the last ᾱ of any schedule
that does not end there (cosine, 4000 steps: 1.5e-10)."""
LARGEST_ALPHA_BAR = 1 - 2.0**-24
"""Replaces ᾱ = 1, where x̂_0 cannot change ε̂: the last float32 below 1."""


def bounded(alpha_bar: Tensor) -> Tensor:
    """ᾱ inside (0, 1), where the formulas below divide by √ᾱ and √(1−ᾱ)."""
    return alpha_bar.clamp(SMALLEST_ALPHA_BAR, LARGEST_ALPHA_BAR)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Shape a (B,) or 0-d ``value`` so that it multiplies ``like`` (B, ...) row by row."""
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def predicted_x_0(
    x_t: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Clean estimate x̂_0 from the denoiser's output (AMG, eq. 12; v: Salimans and Ho, 2022).

    ``x_t`` (B, ...) is variance preserving, √ᾱ·x_0 + √(1−ᾱ)·ε; ``alpha_bar`` is ᾱ_t in (0, 1], 0-d
    or (B,); ``prediction_type`` is the scheduler's ``config.prediction_type``.
    """
    a = per_sample(alpha_bar, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()
    if prediction_type == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * output
    return output


def output_change_from_eps(
    delta_eps: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Change of the denoiser's output that changes ε̂ by ``delta_eps``: Δv = Δε/√ᾱ."""
    a = per_sample(alpha_bar, delta_eps)
    if prediction_type == "epsilon":
        return delta_eps
    if prediction_type == "v_prediction":
        return delta_eps / a.sqrt()
    return -delta_eps * ((1 - a) / a).sqrt()


def eps_change(change: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """Change of ε̂ that results from a change of the denoiser's output: Δε = √ᾱ·Δv."""
    a = per_sample(alpha_bar, change)
    if prediction_type == "epsilon":
        return change
    if prediction_type == "v_prediction":
        return change * a.sqrt()
    return -change * (a / (1 - a)).sqrt()


def output_change_from_x_0(
    delta_x_0: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Change of the denoiser's output that changes x̂_0 by ``delta_x_0``: Δv = −Δx_0/√(1−ᾱ)."""
    a = per_sample(alpha_bar, delta_x_0)
    if prediction_type == "epsilon":
        return -delta_x_0 * (a / (1 - a)).sqrt()
    if prediction_type == "v_prediction":
        return -delta_x_0 / (1 - a).sqrt()
    return delta_x_0


def training_target(
    x_0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The denoiser's training target: ε, or v = √ᾱ·ε − √(1−ᾱ)·x_0, or x_0."""
    a = per_sample(alpha_bar, x_0)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return a.sqrt() * noise - (1 - a).sqrt() * x_0
    return x_0


def alpha_bar_at(scheduler, timestep: Tensor | int, step_index: int) -> Tensor:
    """ᾱ in (0, 1) that the scheduler assigns to its current step, as a 0-d float32 tensor.

    With sigmas (Euler, DPM-Solver++, UniPC; Karras or not), whose timesteps are rounded, from σ at
    ``step_index``: ᾱ = 1/(1 + σ²). From the scale of the denoiser's input for second-order
    schedulers, which may hide the σ of midpoints (Heun, KDPM2, DPM-Solver SDE). Otherwise from
    ``alphas_cumprod`` (DDPM, DDIM, PNDM) at ``timestep``.
    """
    if hasattr(scheduler, "state_in_first_order"):
        return bounded(alpha_bar_of_input(scheduler, timestep))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(scheduler.timesteps) + 1:
        sigma = sigmas[step_index].to(torch.float64)
        return bounded((1 / (1 + sigma**2)).to(torch.float32))
    return bounded(scheduler.alphas_cumprod[int(timestep)].to(torch.float32))


def alpha_bar_of_input(scheduler, timestep: Tensor | int) -> Tensor:
    """ᾱ of a scheduler that divides the denoiser's input by √(1 + σ²), 0-d float32 on the CPU."""
    device = timestep.device if isinstance(timestep, Tensor) else None
    one = torch.ones(1, dtype=torch.float64, device=device)
    scale = torch.as_tensor(scheduler.scale_model_input(one, timestep)).double()
    return scale.square().squeeze().float().cpu()
