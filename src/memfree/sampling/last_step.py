"""Last step of a sampler: what it returns for a prediction, as offset and gain."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from memfree.diffusion_math import output_change_from_x_0, predicted_x_0
from memfree.sampling.noise import kept_random_state, random_state, set_random_state

EXACT = 1e-3  # rounding: deviation of the gain from 1, of the offset relative to x̂_0
LEAST_GAIN = 0.05  # below, the step hardly follows the prediction; not worth correcting
IDLE = 1e-6  # a step ignores its prediction if a change of 1 changes less than this


@dataclass(eq=False)
class LastStep:
    """A scheduler's last step as a function of the clean estimate x̂_0.

    Most samplers return x̂_0. With ``set_alpha_to_one`` false (Stable Diffusion), DDIM's last step
    keeps some of ε̂ and moves by a third of what x̂_0 moves. PNDM, LMS, DEIS and SA-Solver continue
    from earlier predictions; with ``final_sigmas_type`` sigma_min others stop at some noise,
    DPM-Solver++ extrapolates, and Euler may go nowhere. So the scheduler itself is run. Within
    ±``clean_range`` it follows x̂_0, which it clips or thresholds beyond; None if it does not.
    """

    scheduler: Any  # at its last step, which it has not taken; copied, not changed
    t: Tensor
    sample: Tensor  # x_t (B, ...) as the denoiser received it
    output: Tensor  # the model's prediction, like x_t
    alpha_bar: Tensor
    eta: float = 0.0  # of DDIM: share of fresh noise that the step adds
    # Of the step's noise; None: torch's own. SA-Solver's noise is reproduced only in float32.
    generator: torch.Generator | list[torch.Generator] | None = None
    # σ of x_t = (1 − σ)·x_0 + σ·ε under flow matching, where the model predicts ε − x_0.
    flow_sigma: float | None = None
    idle: Sequence[Tensor] = ()  # timesteps after this one, which do not follow their predictions

    def __post_init__(self) -> None:
        self._may_draw = _may_draw(self.scheduler, self.eta, self.generator)
        self._random_state = random_state(self.output.device)
        x_t = self.sample.float()
        if self.flow_sigma is None:
            kind = self.scheduler.config.prediction_type
            self._x_0 = predicted_x_0(x_t, self.output.float(), self.alpha_bar, kind)
            # Schedulers that step in σ hold x_t·√(1 + σ²); scaling a one shows the factor.
            one = torch.ones((), dtype=x_t.dtype, device=x_t.device)
            self._held = x_t / copy.deepcopy(self.scheduler).scale_model_input(one, self.t)
        else:
            self._x_0 = x_t - self.flow_sigma * self.output.float()
            self._held = x_t
        self.clean_range = self._clean_range()

    def __call__(self, x_0: Tensor) -> Tensor:
        """Result of the step if the clean estimate is x̂_0 (B, ...), float32."""
        return self._step(self.output.float() + self._change(x_0.float() - self._x_0))

    def linear(self) -> tuple[Tensor, float] | None:
        """(offset, gain): the step returns offset + gain·x̂_0, within the range where it clips.

        Offset like x_t, float32; gain exactly 0 below ``LEAST_GAIN``. None: it returns x̂_0.
        """
        now = self._step(self.output.float())
        # Linear in the prediction with one coefficient for all elements, so two steps suffice.
        if self.clean_range is None:
            other = self._step(self.output.float() + self._change(torch.ones_like(now)))
            gain = _mean(other - now)
            offset, size = now - gain * self._x_0, _largest(self._x_0.abs())
        else:
            offset, gain = self._within(self.clean_range)
            size = self.clean_range
        if abs(gain) < LEAST_GAIN:
            return now, 0.0
        exact = abs(gain - 1) < EXACT and _largest(offset.abs()) <= EXACT * size
        return None if exact else (offset, gain)

    def _within(self, limit: float) -> tuple[Tensor, float]:
        offset = self(torch.zeros_like(self._x_0))
        half = self(torch.full_like(self._x_0, limit / 2))
        return offset, _mean(half - offset) / (limit / 2)

    def _clean_range(self) -> float | None:
        config, limits = self.scheduler.config, []
        if _option(self.scheduler, "thresholding", False):
            # Dynamic thresholding leaves x̂_0 alone where its largest elements are below 1.
            limits.append(min(1.0, float(config.get("sample_max_value", 1.0))))
        elif _option(self.scheduler, "clip_sample", False):
            limits.append(float(config.get("clip_sample_range", 1.0)))
        for limit in limits:
            offset, gain = self._within(limit)
            beyond = self(torch.full_like(self._x_0, 2 * limit))
            if bool(((beyond - offset).abs() < 1.99 * abs(gain) * limit).any()):
                return limit  # TCD has these options and ignores them
        return None

    def _change(self, delta_x_0: Tensor) -> Tensor:
        if self.flow_sigma is not None:
            return -delta_x_0 / self.flow_sigma
        kind = self.scheduler.config.prediction_type
        return output_change_from_x_0(delta_x_0, self.alpha_bar, kind)

    def is_last(self) -> bool:
        """Whether ``idle`` steps ignore their predictions: σ may end on one value twice (DEIS)."""
        output = self.output.float()
        one, other = self._step(output, output), self._step(output, output + 1)
        return _largest((one - other).abs()) <= IDLE

    def _step(self, prediction: Tensor, afterwards: Tensor | None = None) -> Tensor:
        # The class's own step: a replacement on the instance may record the real steps.
        own, scheduler = type(self.scheduler).step, self.scheduler
        with self._torch_random_state():
            options = _step_options(scheduler, self.output, self.eta, self.generator)
            copied, held = _in_float32(scheduler), self._held
            for t in (self.t, *self.idle):
                held = torch.as_tensor(own(copied, prediction, t, held, **options)[0])
                prediction = prediction if afterwards is None else afterwards
            return held

    @contextmanager
    def _torch_random_state(self) -> Iterator[None]:
        """Without a generator, draw what the real step will draw."""
        if not self._may_draw:  # leave torch's generators to other threads
            yield
            return
        with kept_random_state(self.output.device):
            set_random_state(self._random_state)
            yield


def last_step(step: LastStep, image_range: float | None = None) -> dict[str, Any]:
    """Fields of the last ``Prediction``; samples are clamped to ±``image_range`` anyway."""
    linear = step.linear()
    if step.clean_range is None:
        return {"returned": linear}
    clamps_only = linear is None and not _option(step.scheduler, "thresholding", False)
    if clamps_only and image_range is not None and image_range <= step.clean_range:
        return {"returned": None}
    return {"returned": linear, "finish": step, "clean_range": step.clean_range}


def _may_draw(scheduler: Any, eta: float, generator: Any) -> bool:
    if hasattr(scheduler, "noise_sampler"):  # DPM-Solver SDE seeds a tree of its own
        return True
    parameters = inspect.signature(type(scheduler).step).parameters.keys()
    if generator is not None or ("eta" in parameters and eta == 0):
        return False
    return bool({"generator", "variance_noise"} & parameters)


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if len(finite) else float("nan")


def _mean(values: Tensor) -> float:
    """Of finite values: a broken sample must not spoil the others of its batch."""
    finite = values.isfinite()
    return float((values if bool(finite.all()) else values[finite]).mean())


def _step_options(scheduler: Any, output: Tensor, eta: float, generator: Any) -> dict[str, Any]:
    """Options of ``step`` with which it draws the same noise as the pipeline's step will."""
    parameters = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"return_dict": False}
    if "eta" in parameters:
        options["eta"] = eta
    if eta > 0 and {"eta", "variance_noise"} <= parameters.keys():
        # DDIM draws in the prediction's precision; the steps here are float32.
        copied = copy.deepcopy(generator)
        noise = randn_tensor(output.shape, copied, output.device, output.dtype)
        options["variance_noise"] = noise.float()
    elif "generator" in parameters:
        options["generator"] = copy.deepcopy(generator)
    return options


def _in_float32(scheduler: Any) -> Any:
    """A copy with its history in float32: half precision would round the effect of a prediction."""

    def widened(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    copied = copy.deepcopy(scheduler)
    for name, value in vars(copied).items():
        if isinstance(value, list):
            setattr(copied, name, [widened(item) for item in value])
        elif isinstance(value, Tensor):
            setattr(copied, name, widened(value))
    return copied


def _option(scheduler: Any, name: str, default: bool) -> bool:
    """An option that the class itself has: ``from_config`` keeps other classes' options too."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return bool(scheduler.config[name]) if name in own else default
