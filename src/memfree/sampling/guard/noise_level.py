"""Which step a pipeline is at, and how noisy its sample is there, as its scheduler has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memfree.diffusion_math import alpha_bar_at

SMALLEST_ALPHA_BAR = 2.0**-24
"""ᾱ is kept above this, as diffusers does: at ᾱ = 0 no noise estimate moves x̂_0."""
LARGEST_FLOW_SIGMA = 1 - 2.0**-12
"""σ of flow matching is kept below this, for the same reason."""


@dataclass(frozen=True)
class NoiseLevel:
    """Where in the schedule one call of the denoiser stands."""

    step: int
    """Number of this denoiser call within the pipeline call, from 0."""
    t: float
    """The scheduler's timestep."""
    time: float
    """t over the number of training timesteps, in [0, 1]: 1 is noise."""
    alpha_bar: Tensor
    """ᾱ of the variance-preserving sample, 0-d float32."""
    flow_sigma: float | None
    """σ of x_t = (1 − σ)·x_0 + σ·ε under flow matching; None otherwise."""
    is_last: bool
    """Whether the scheduler has no further step."""


class NoiseLevels:
    """Follows one pipeline call through its schedule, one denoiser call at a time.

    Args:
        scheduler: the pipeline's, read and never changed.
        flow: whether the model was trained by flow matching.
    """

    def __init__(self, scheduler: Any, flow: bool) -> None:
        self.scheduler = scheduler
        self.flow = flow
        self._calls = 0
        self._first = 0

    def next(self, timestep: Tensor) -> NoiseLevel:
        """The level of the denoiser call that is being made at ``timestep`` (0-d or equal rows)."""
        t = timestep.flatten()[0].detach()
        index = self._index(t)
        step, self._calls = self._calls, self._calls + 1
        sigma = None
        if self.flow:
            sigma = min(float(self.scheduler.sigmas[index]), LARGEST_FLOW_SIGMA)
            signal, noise = (1 - sigma) ** 2, sigma**2
            alpha_bar = torch.tensor(signal / (signal + noise), dtype=torch.float32)
        else:
            alpha_bar = self._alpha_bar(t, index)
        return NoiseLevel(
            step=step,
            t=float(t),
            time=float(t) / self.scheduler.config.num_train_timesteps,
            alpha_bar=alpha_bar.clamp(min=SMALLEST_ALPHA_BAR).to(timestep.device),
            flow_sigma=sigma,
            is_last=index == len(self.scheduler.timesteps) - 1,
        )

    def _index(self, t: Tensor) -> int:
        """Position in ``scheduler.timesteps``, which image-to-image does not enter at 0."""
        if hasattr(self.scheduler, "step_index"):
            if self.scheduler.step_index is not None:
                return int(self.scheduler.step_index)
            if self.scheduler.begin_index is not None:
                return int(self.scheduler.begin_index)
            return int(self.scheduler.index_for_timestep(t))
        if self._calls == 0:
            # PNDM repeats timesteps: only the first call is looked up, the others are counted.
            same = self.scheduler.timesteps.to(t.device) == t
            self._first = int(same.nonzero()[0]) if bool(same.any()) else 0
        return self._first + self._calls

    def _alpha_bar(self, t: Tensor, index: int) -> Tensor:
        if hasattr(self.scheduler, "state_in_first_order"):
            # Second-order schedulers keep the σ of their middle points to themselves, but divide
            # the denoiser's input by √(σ² + 1).
            one = torch.ones(1, dtype=torch.float64, device=t.device)
            scale = self.scheduler.scale_model_input(one, t).double()
            return scale.square().squeeze().float().cpu()
        timestep = t if t.is_floating_point() else int(t)
        return alpha_bar_at(self.scheduler, timestep, index).detach().clone()


def check_scheduler(scheduler: Any, flow: bool) -> None:
    """Refuse schedulers whose noise the guard cannot describe.

    Raises:
        ValueError: the scheduler preconditions (EDM), or is not of the model's kind.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("sigma_data") is not None:
        raise ValueError(
            f"memfree.guard: {name} scales samples by sigma_data (EDM), where x_t is not "
            "√ᾱ·x_0 + √(1−ᾱ)·ε; use EulerDiscreteScheduler or DPMSolverMultistepScheduler"
        )
    is_flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    if flow != is_flow:
        wanted = "a flow-matching scheduler" if flow else "a diffusion scheduler"
        raise ValueError(f"memfree.guard: this pipeline's model needs {wanted}, not {name}")
    if flow:
        return
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"memfree.guard: prediction_type {kind!r} of {name} is not supported")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"memfree.guard: {name} has no alphas_cumprod to take noise levels from")
