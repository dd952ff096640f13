"""What a sampler makes of its last prediction: the clean estimate itself, or something near it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import PNDMScheduler
from torch import Tensor

from memfree.diffusion_math import output_change_from_x_0, predicted_x_0


def returned(
    scheduler: Any, t: Tensor, sample: Tensor, output: Tensor, alpha_bar: Tensor
) -> tuple[Tensor, float] | None:
    """(offset, gain): the last step returns offset + gain·x̂_0, whatever x̂_0 guidance makes of it.

    Most samplers return x̂_0. Stable Diffusion's own settings do not: with ``set_alpha_to_one``
    false, DDIM's last step goes to ᾱ_0 and keeps some of ε̂, so that it moves by a third of what
    x̂_0 moves; PNDM extrapolates from earlier predictions.

    Args:
        scheduler: at its last step, which it has not taken; it is copied, not changed.
        t: the timestep.
        sample: x_t (B, ...).
        output: the model's prediction, like x_t.
        alpha_bar: ᾱ_t.

    Returns:
        offset like x_t in float32, and gain; None where the sampler returns x̂_0, clamped or not.
    """
    if _option(scheduler, "set_alpha_to_one", True) and not isinstance(scheduler, PNDMScheduler):
        return None
    if _option(scheduler, "clip_sample", False) or _option(scheduler, "thresholding", False):
        return None  # not linear

    def step(prediction: Tensor) -> Tensor:
        # The class's own step: one that was replaced on the instance may watch the real steps.
        own = type(scheduler).step
        taken = own(copy.deepcopy(scheduler), prediction, t, sample.float(), return_dict=False)
        return torch.as_tensor(taken[0])

    # Linear in the prediction, with one coefficient for all elements: two steps tell it.
    kind = scheduler.config.prediction_type
    before = step(output.float())
    one = output_change_from_x_0(torch.ones_like(before), alpha_bar, kind)
    gain = float((step(output.float() + one) - before).mean())
    x_0 = predicted_x_0(sample.float(), output.float(), alpha_bar, kind)
    return before - gain * x_0, gain


def _option(scheduler: Any, name: str, default: bool) -> bool:
    """An option of the scheduler's own: ``from_config`` keeps those of the other class as well."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return bool(scheduler.config[name]) if name in own else default
