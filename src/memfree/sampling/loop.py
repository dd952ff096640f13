"""Denoising loop for any diffusers scheduler, in batches, with guidance as a function."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import Conditions, Encode, TextConditions
from memfree.diffusion_math import alpha_bar_at
from memfree.guidance.prediction import Guidance, Prediction, apply, combine
from memfree.sampling.last_step import LastStep, last_step

Denoise = Callable[[Tensor, Tensor, Conditions | None], Tensor]
"""(x_t, t, conditions or None) → prediction of ``scheduler.config.prediction_type``. A denoiser
with ``unconditional(count, device)``, what None stands for, may run both branches at once."""

TRACE_COLUMNS = ("sigma", "lambda", "active", "nearest", "s1", "s2", "g_sim_norm", "g_mul_norm")
"""σ_t, λ_t, whether AMG acted, n_0's row, s_1, s_2, norms of G_sim and G_mul as changes of ε̂."""


@dataclass(frozen=True)
class Result:
    """Result of ``sample``."""

    images: Tensor  # (B, C, H, W), as the model makes them: in [−1, 1] if its scheduler clamps
    # Columns (steps·B,), step by step: sample, step, t, and TRACE_COLUMNS; None untraced.
    trace: dict[str, Tensor] | None


def sample(
    denoiser: Denoise,
    scheduler: Any,
    noise: Tensor,
    steps: int,
    guidance: Guidance | Sequence[Guidance] | None = None,
    conditions: Conditions | None = None,
    guidance_scale: float = 1.0,
    trace: bool = False,
    generators: list[torch.Generator] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    encode: Encode | None = None,
    decode_last: Callable[[Tensor], Tensor] | None = None,
    one_call: bool = True,
) -> Result:
    """Denoise ``noise`` with a scheduler, passing each prediction through the guidance.

    Args:
        denoiser: the network; called with ``conditions=None`` for the unconditional prediction;
            only it runs under autocast.
        scheduler: a diffusers scheduler (ε, v or x_0 prediction); it is copied, not changed.
        noise: (B, C, H, W) standard normal, on the device to sample on.
        guidance: one guidance or several in order; None: plain sampling.
        conditions: (B, ...) conditions y; None: unconditional sampling.
        guidance_scale: s_0 of classifier-free guidance, ε_u + s_0·(ε_c − ε_u); 1: no guidance.
        trace: return what the guidances recorded.
        generators: one per sample, for schedulers that draw noise at each step.
        decode: from x̂_0 to images, for latents; identity by default.
        encode: from captions to conditions, for guidances that need the nearest caption's.
        decode_last: decoder of the last step if ``decode`` is an approximation.
        one_call: run both branches of classifier-free guidance in one call if the denoiser has
            ``unconditional`` and memory suffices. Two calls (False) differ in the last bits.

    Raises:
        ValueError: the prediction type is unknown, or NaN appears in the samples.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {prediction_type!r} is not supported by sample()")
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    kwargs = {"generator": generators} if generators is not None and takes_generator else {}
    # Copied to the host once, so that no step waits for the device.
    times = scheduler.timesteps.tolist()
    alpha_bars = None
    if not hasattr(scheduler, "state_in_first_order"):  # midpoints are known only at their step
        alpha_bars = torch.stack([alpha_bar_at(scheduler, t, i) for i, t in enumerate(times)])
        alpha_bars = alpha_bars.to(noise.device)
    x_t = noise * scheduler.init_noise_sigma
    needs_uncond = conditions is None or guidance_scale != 1
    null = None
    if one_call and conditions is not None and needs_uncond:
        null = unconditional(denoiser, conditions)
    rows: list[dict[str, Tensor]] = []
    memory: dict[Any, Any] = {}
    ended = False  # if the last step follows no prediction, the one before is the end
    device = noise.device.type
    mixed, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    for step, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x_t, t)

        def denoise(x: Tensor, y: Conditions | None, t: Tensor = t) -> Tensor:
            with torch.autocast(device, half, mixed):
                return denoiser(x, t, y)

        # Mixed precision only for the network: guidance and its gradients would lose digits.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            cond = uncond = None
            if null is not None and conditions is not None:
                try:
                    both = denoise(torch.cat([x_in, x_in]), _joined(null, conditions))
                    uncond, cond = both.chunk(2)
                except torch.OutOfMemoryError:
                    null = None  # two calls from now on
            if null is None:
                cond = None if conditions is None else denoise(x_in, conditions)
                uncond = denoise(x_in, None) if needs_uncond else None
            output = combine(cond, uncond, guidance_scale)
            if alpha_bars is None:
                alpha_bar = alpha_bar_at(scheduler, t, step).to(noise.device)
            else:
                alpha_bar = alpha_bars[step]
            following = scheduler.timesteps[step + 1 :]
            is_last = not len(following) and not ended
            if is_last or len(following) == 1:
                ending = LastStep(
                    scheduler, t, x_in, output, alpha_bar, generator=generators, idle=following
                )
            if len(following) == 1:
                is_last = ended = ending.is_last()
            decode_here = decode_last if is_last and decode_last is not None else decode
            prediction = Prediction(
                x_t=x_in,
                alpha_bar=alpha_bar,
                time=times[step] / scheduler.config.num_train_timesteps,
                output=output,
                output_cond=cond,
                output_uncond=uncond,
                conditions=conditions,
                guidance_scale=guidance_scale if conditions is not None else 1.0,
                prediction_type=prediction_type,
                denoise=denoise,
                step=step,
                is_last=is_last,
                image_range=1.0 if decode is None else None,
                decode=decode_here or (lambda x_0: x_0),
                encode=encode,
                memory=memory,
            )
            if is_last:
                fields = last_step(ending, prediction.image_range)
                prediction = replace(prediction, **fields)
            prediction = apply(guidance, prediction)
            x_t = scheduler.step(prediction.output, t, x_t, **kwargs).prev_sample
        if trace:
            rows.append(trace_rows(prediction, step, times[step]))
    if not bool(torch.isfinite(x_t).all()):
        raise ValueError("the sampler produced NaN or infinite values; check the model's weights")
    if not rows:
        return Result(x_t, None)
    columns = {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}
    return Result(x_t, columns)


def unconditional(denoiser: Denoise, conditions: Conditions) -> Conditions | None:
    """Conditions for ``None``, one per sample, if they fit in a batch with ``conditions``."""
    make: Callable[..., Conditions | None] = getattr(denoiser, "unconditional", lambda *_: None)
    if isinstance(conditions, Tensor):
        null = make(len(conditions), conditions.device)
        fits = isinstance(null, Tensor) and null.shape == conditions.shape
        return null.to(conditions.dtype) if fits and isinstance(null, Tensor) else None
    null = make(len(conditions), conditions.embeddings.device)
    same = isinstance(null, TextConditions) and null.shapes() == conditions.shapes()
    return null if same else None


def _joined(null: Conditions, conditions: Conditions) -> Conditions:
    if isinstance(null, TextConditions) and isinstance(conditions, TextConditions):
        return TextConditions.cat([null, conditions])
    assert isinstance(null, Tensor) and isinstance(conditions, Tensor)
    return torch.cat([null, conditions])


def trace_rows(prediction: Prediction, step: int, t: float) -> dict[str, Tensor]:
    """This step's trace rows, left on the device: a copy to the host would wait at each step."""
    batch, device = len(prediction.x_t), prediction.x_t.device
    rows = {
        "sample": torch.arange(batch, device=device),
        "step": torch.full((batch,), step, device=device),
        "t": torch.full((batch,), float(t), dtype=torch.float32, device=device),
    }
    defaults = {"active": (False, torch.bool), "nearest": (-1, torch.int64)}
    for name in dict.fromkeys([*TRACE_COLUMNS, *prediction.trace]):
        value = prediction.active if name == "active" else prediction.trace.get(name)
        if value is None:
            fill, dtype = defaults.get(name, (float("nan"), torch.float32))
            rows[name] = torch.full((batch,), fill, dtype=dtype, device=device)
        else:
            rows[name] = value.detach().to(device)
    return rows
