"""What a sampler makes of its last prediction: the clean estimate itself, or something near it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from memfree.diffusion_math import output_change_from_x_0, predicted_x_0
from memfree.sampling.noise import kept_random_state

EXACT = 1e-3
"""A gain as near to 1, and an offset as small beside x̂_0, are rounding."""
LEAST_GAIN = 0.05
"""With less, a step hardly follows the prediction, and no correction of it is worth its size."""


def returned(
    scheduler: Any,
    t: Tensor,
    sample: Tensor,
    output: Tensor,
    alpha_bar: Tensor,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[Tensor, float] | None:
    """(offset, gain): the last step returns offset + gain·x̂_0, whatever x̂_0 guidance makes of it.

    Most samplers return x̂_0. Stable Diffusion's own settings do not: with ``set_alpha_to_one``
    false, DDIM's last step goes to ᾱ_0 and keeps some of ε̂, so that it moves by a third of what
    x̂_0 moves. PNDM, LMS, DEIS and SA-Solver go on from earlier predictions; with
    ``final_sigmas_type`` sigma_min others stop at some noise, DPM-Solver++ extrapolates, and
    Euler's step may go nowhere. So the scheduler itself is asked.

    Args:
        scheduler: at its last step, which it has not taken; it is copied, not changed.
        t: the timestep.
        sample: x_t (B, ...), variance preserving, as the denoiser was given it.
        output: the model's prediction, like x_t.
        alpha_bar: ᾱ_t.
        eta: η of DDIM, the share of fresh noise that the step adds; other samplers have none.
        generator: what it is drawn from, None for torch's own; it is copied, not used. (SA-Solver's
            noise is foreseen in float32 alone.)

    Returns:
        offset like x_t in float32, and gain, exactly 0 where it is below ``LEAST_GAIN``: nothing
        can be corrected; None where the sampler returns x̂_0, clamped or not.
    """
    if _option(scheduler, "clip_sample", False) or _option(scheduler, "thresholding", False):
        return None  # not linear
    x_t = sample.float()
    # Schedulers that step in σ hold x_t·√(1 + σ²), and tell that by what they make of ones.
    one = torch.ones((), dtype=x_t.dtype, device=x_t.device)
    held = x_t / copy.deepcopy(scheduler).scale_model_input(one, t)

    def step(prediction: Tensor) -> Tensor:
        # The class's own step: one that was replaced on the instance may watch the real steps.
        own = type(scheduler).step
        with kept_random_state(output.device):
            options = _step_options(scheduler, output, eta, generator)
            return torch.as_tensor(own(_in_float32(scheduler), prediction, t, held, **options)[0])

    # Linear in the prediction, with one coefficient for all elements: two steps tell it.
    kind = scheduler.config.prediction_type
    before = step(output.float())
    change = output_change_from_x_0(torch.ones_like(before), alpha_bar, kind)
    gain = float((step(output.float() + change) - before).mean())
    x_0 = predicted_x_0(x_t, output.float(), alpha_bar, kind)
    if abs(gain) < LEAST_GAIN:
        return before, 0.0
    offset = before - gain * x_0
    exact = abs(gain - 1) < EXACT and bool(offset.abs().max() <= EXACT * x_0.abs().max())
    return None if exact else (offset, gain)


def _step_options(scheduler: Any, output: Tensor, eta: float, generator: Any) -> dict[str, Any]:
    """Keyword arguments of ``step`` that make it draw the noise that the pipeline's will draw."""
    taken = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"return_dict": False}
    if "eta" in taken:
        options["eta"] = eta
    if eta > 0 and {"eta", "variance_noise"} <= taken.keys():
        # DDIM draws in the prediction's own precision, which is not that of the steps asked for.
        copied = copy.deepcopy(generator)
        noise = randn_tensor(output.shape, copied, output.device, output.dtype)
        options["variance_noise"] = noise.float()
    elif "generator" in taken:
        options["generator"] = copy.deepcopy(generator)
    return options


def _in_float32(scheduler: Any) -> Any:
    """A copy whose history of half-precision steps does not round what it makes of a prediction."""
    copied = copy.deepcopy(scheduler)
    for name, value in vars(copied).items():
        if isinstance(value, Tensor):
            setattr(copied, name, _not_half(value))
        elif isinstance(value, list):
            setattr(copied, name, [_not_half(one) for one in value])
    return copied


def _not_half(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _option(scheduler: Any, name: str, default: bool) -> bool:
    """An option of the scheduler's own: ``from_config`` keeps those of the other class as well."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return bool(scheduler.config[name]) if name in own else default
