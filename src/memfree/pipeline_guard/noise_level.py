"""Noise level and step of a pipeline, read from its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from memfree.diffusion_math import PredictionType, alpha_bar_at, alpha_bar_of_input

SMALLEST_ALPHA_BAR = 2.0**-24  # as in diffusers: at ᾱ = 0 no noise estimate changes x̂_0
LARGEST_FLOW_SIGMA = 1 - 2.0**-12  # of flow matching, for the same reason


@dataclass(frozen=True)
class NoiseLevel:
    """Position of one denoiser call in the schedule."""

    step: int  # number of this denoiser call within the pipeline call, from 0
    t: float  # the scheduler's timestep
    time: float  # t over the number of training timesteps, in [0, 1]: 1 is noise
    alpha_bar: Tensor  # ᾱ of the variance-preserving sample, 0-d float32
    flow_sigma: float | None  # σ of x_t = (1 − σ)·x_0 + σ·ε; None without flow matching
    following: Tensor  # timesteps of the steps after this one

    @property
    def is_last(self) -> bool:
        """Whether the scheduler has no further step."""
        return not len(self.following)


@dataclass
class NoiseLevels:
    """Follows one pipeline call by counting its steps: schedules repeat timesteps (PNDM, Heun)."""

    scheduler: Any
    flow: bool  # whether the model was trained by flow matching
    _calls: int = 0
    _planned: int = 0
    _schedule: Tensor = field(default_factory=lambda: torch.empty(0))
    _starts: list[int] = field(default_factory=list)  # where the pipeline may have begun

    def next(self, timestep: Tensor | float, planned: int | None = None) -> NoiseLevel:
        """The level of the current denoiser call; ``planned``: those of the whole pipeline call."""
        timestep = torch.as_tensor(timestep)  # some callers give a number
        t = timestep.flatten()[0].detach()
        position = self._position(t.cpu(), planned)
        index = self._index(t, position)
        step, self._calls = self._calls, self._calls + 1
        sigma = None
        if self.flow:
            sigma = min(float(self.scheduler.sigmas[index]), LARGEST_FLOW_SIGMA)
            signal, noise = (1 - sigma) ** 2, sigma**2
            alpha_bar = torch.tensor(signal / (signal + noise), dtype=torch.float32)
        elif hasattr(self.scheduler, "state_in_first_order"):
            alpha_bar = alpha_bar_of_input(self.scheduler, t)
        else:
            whole = t if t.is_floating_point() else int(t)
            alpha_bar = alpha_bar_at(self.scheduler, whole, index).detach().clone()
        return NoiseLevel(
            step=step,
            t=float(t),
            time=float(t) / self.scheduler.config.num_train_timesteps,
            alpha_bar=alpha_bar.clamp(min=SMALLEST_ALPHA_BAR).to(timestep.device),
            flow_sigma=sigma,
            following=self._schedule[position + 1 :].to(timestep.device),
        )

    def check_followed(self, interrupted: bool) -> None:
        """Refuse a finished call with denoiser calls missing; an interrupted one makes fewer."""
        if self._calls and (interrupted or self._calls >= self._planned):
            return
        raise ValueError(
            f"memfree.guard: the pipeline's denoiser was called {self._calls} times where "
            f"{self._planned or 'its'} steps are due: it calls another, or in a thread of its own, "
            "where the guard does not follow, so that its images would be unguided"
        )

    def _position(self, t: Tensor, planned: int | None) -> int:
        """Position in the schedule; image-to-image does not start at 0."""
        if self._calls == 0:
            # A copy: another pipeline call may reset the scheduler's timesteps.
            self._schedule = self.scheduler.timesteps.detach().cpu().clone()
            likely = self._begin_index()  # decides if the first timestep occurs twice
            if likely is None and planned is not None:
                likely = len(self._schedule) - planned
            starts = (self._schedule.to(t.dtype) == t).nonzero().flatten().tolist()
            self._starts = sorted(starts, key=lambda start: start != likely)
            self._planned = len(self._schedule) - (self._starts or [0])[0]
            self._planned = self._planned if planned is None else planned
        expected = self._schedule.to(t.dtype).tolist()
        self._starts = [
            start
            for start in self._starts
            if start + self._calls < len(expected) and expected[start + self._calls] == float(t)
        ]
        if not self._starts:
            raise ValueError(
                f"memfree.guard: call {self._calls + 1} of the denoiser is at timestep "
                f"{float(t):g}, where the scheduler's timesteps have another: the guard follows "
                "pipelines that call their denoiser once a timestep, in order"
            )
        return self._starts[0] + self._calls

    def _begin_index(self) -> int | None:
        begin = getattr(self.scheduler, "begin_index", None)  # inverse schedulers have none
        return None if begin is None else int(begin)

    def _index(self, t: Tensor, position: int) -> int:
        if not hasattr(self.scheduler, "step_index"):
            return position
        if self.scheduler.step_index is not None:
            return int(self.scheduler.step_index)
        if (begin := self._begin_index()) is not None:
            return begin
        if not hasattr(self.scheduler, "index_for_timestep"):
            return position
        return int(self.scheduler.index_for_timestep(self._schedule[position].to(t.device)))


def check_scheduler(scheduler: Any, flow: bool) -> None:
    """Refuse a scheduler with unsupported noise, or for another kind of model."""
    name, config = type(scheduler).__name__, scheduler.config
    why = ""
    if config.get("sigma_data") is not None:
        why = (
            f"{name} scales samples by sigma_data (EDM), where x_t is not √ᾱ·x_0 + √(1−ᾱ)·ε; use "
            "EulerDiscreteScheduler or DPMSolverMultistepScheduler"
        )
    elif config.get("invert_sigmas"):
        why = (
            f"{name} with invert_sigmas runs from σ = 0 to 1, where x_t is not (1−σ)·x_0 + σ·ε; "
            "use it without"
        )
    elif flow != (name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))):
        why = f"the model needs a {'flow-matching' if flow else 'diffusion'} scheduler, not {name}"
    elif not flow and config.get("prediction_type", "epsilon") not in get_args(PredictionType):
        why = f"prediction_type {config['prediction_type']!r} of {name} is not supported"
    elif not flow and not hasattr(scheduler, "alphas_cumprod"):
        why = f"{name} has no alphas_cumprod to take noise levels from"
    if why:
        raise ValueError(f"memfree.guard: {why}")
