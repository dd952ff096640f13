"""What a sampler makes of its last prediction: the clean estimate itself, or something near it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from memfree.diffusion_math import output_change_from_x_0, predicted_x_0


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
    x̂_0 moves; PNDM extrapolates from earlier predictions.

    Args:
        scheduler: at its last step, which it has not taken; it is copied, not changed.
        t: the timestep.
        sample: x_t (B, ...).
        output: the model's prediction, like x_t.
        alpha_bar: ᾱ_t.
        eta: η of DDIM, the share of fresh noise that the step adds; other samplers have none.
        generator: what it is drawn from, None for torch's own; it is copied, not used.

    Returns:
        offset like x_t in float32, and gain; None where the sampler returns x̂_0, clamped or not.
    """
    if _option(scheduler, "set_alpha_to_one", True) and not isinstance(scheduler, PNDMScheduler):
        return None
    if _option(scheduler, "clip_sample", False) or _option(scheduler, "thresholding", False):
        return None  # not linear
    options: dict[str, Any] = {"return_dict": False}
    taken_by_step = inspect.signature(scheduler.step).parameters
    if "eta" in taken_by_step:
        options["eta"] = eta
        if eta > 0 and "variance_noise" in taken_by_step:
            options["variance_noise"] = _noise_to_come(output, generator)

    def step(prediction: Tensor) -> Tensor:
        # The class's own step: one that was replaced on the instance may watch the real steps.
        own = type(scheduler).step
        taken = own(copy.deepcopy(scheduler), prediction, t, sample.float(), **options)
        return torch.as_tensor(taken[0])

    # Linear in the prediction, with one coefficient for all elements: two steps tell it.
    kind = scheduler.config.prediction_type
    before = step(output.float())
    one = output_change_from_x_0(torch.ones_like(before), alpha_bar, kind)
    gain = float((step(output.float() + one) - before).mean())
    x_0 = predicted_x_0(sample.float(), output.float(), alpha_bar, kind)
    return before - gain * x_0, gain


def _noise_to_come(output: Tensor, generator: Any) -> Tensor:
    """What the step will draw, float32 like ``output``; every generator stays where it is."""
    on = output.device
    if on.type == "cpu":
        saved = torch.random.fork_rng([])
    else:
        saved = torch.random.fork_rng([on], device_type=on.type)
    with saved:
        return randn_tensor(
            output.shape, copy.deepcopy(generator), output.device, output.dtype
        ).float()


def _option(scheduler: Any, name: str, default: bool) -> bool:
    """An option of the scheduler's own: ``from_config`` keeps those of the other class as well."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return bool(scheduler.config[name]) if name in own else default
