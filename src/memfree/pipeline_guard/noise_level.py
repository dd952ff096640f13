"""Noise level and step of a pipeline, from its scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memfree.diffusion_math import alpha_bar_at, alpha_bar_of_input

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
    following: Tensor
    """Timesteps of the steps after this one."""

    @property
    def is_last(self) -> bool:
        """Whether the scheduler has no further step."""
        return not len(self.following)


class NoiseLevels:
    """Follows one pipeline call through its schedule, one denoiser call at a time.

    Steps are counted, because schedules repeat timesteps (PNDM, Heun, rounded Karras sigmas); the
    timestep of every call must be the one that the schedule has there.

    Args:
        scheduler: the pipeline's, read and never changed.
        flow: whether the model was trained by flow matching.
    """

    def __init__(self, scheduler: Any, flow: bool) -> None:
        self.scheduler = scheduler
        self.flow = flow
        self._calls = 0
        self._schedule = torch.empty(0)
        self._starts: list[int] = []
        self._planned = 0

    def next(self, timestep: Tensor | float, planned: int | None = None) -> NoiseLevel:
        """The level of the denoiser call that is being made.

        Args:
            timestep: t of the call, 0-d or equal rows.
            planned: denoiser calls of the whole pipeline call; None: not known.

        Raises:
            ValueError: the schedule has another timestep here.
        """
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
        else:
            alpha_bar = self._alpha_bar(t, index)
        return NoiseLevel(
            step=step,
            t=float(t),
            time=float(t) / self.scheduler.config.num_train_timesteps,
            alpha_bar=alpha_bar.clamp(min=SMALLEST_ALPHA_BAR).to(timestep.device),
            flow_sigma=sigma,
            following=self._schedule[position + 1 :].to(timestep.device),
        )

    def check_followed(self, interrupted: bool) -> None:
        """Refuse a finished pipeline call whose denoiser was called elsewhere too, or not at all.

        Args:
            interrupted: whether the pipeline was asked to stop before the end.

        Raises:
            ValueError: fewer calls were seen than the pipeline planned.
        """
        if self._calls and (interrupted or self._calls >= self._planned):
            return
        raise ValueError(
            f"memfree.guard: the pipeline's denoiser was called {self._calls} times where "
            f"{self._planned or 'its'} steps are due: it calls another, or in a thread of its own, "
            "where the guard does not follow, so that its images would be unguided"
        )

    def _position(self, t: Tensor, planned: int | None) -> int:
        """Position of this call in the schedule, which image-to-image does not enter at 0."""
        if self._calls == 0:
            # A copy: another call of the pipeline may set the scheduler's timesteps anew.
            self._schedule = self.scheduler.timesteps.detach().cpu().clone()
            likely = self._likely_start(planned)
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

    def _likely_start(self, planned: int | None) -> int | None:
        """Where the pipeline enters a schedule in which its first timestep stands twice."""
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        return None if planned is None else len(self._schedule) - planned

    def _index(self, t: Tensor, position: int) -> int:
        """Position in the scheduler's own tables, as the scheduler counts."""
        if not hasattr(self.scheduler, "step_index"):
            return position
        if self.scheduler.step_index is not None:
            return int(self.scheduler.step_index)
        begin = getattr(self.scheduler, "begin_index", None)  # inverse schedulers have none
        if begin is not None:
            return int(begin)
        if not hasattr(self.scheduler, "index_for_timestep"):
            return position
        same = self._schedule[position].to(t.device)
        return int(self.scheduler.index_for_timestep(same))

    def _alpha_bar(self, t: Tensor, index: int) -> Tensor:
        if hasattr(self.scheduler, "state_in_first_order"):
            return alpha_bar_of_input(self.scheduler, t)
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
    if config.get("invert_sigmas"):
        raise ValueError(
            f"memfree.guard: {name} with invert_sigmas runs from σ = 0 to 1, where x_t is not "
            "(1−σ)·x_0 + σ·ε; use it without"
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
