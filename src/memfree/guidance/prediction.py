"""Prediction: the record of one denoising step that a guidance takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from memfree.conditions import Conditions, Encode
from memfree.diffusion_math import (
    PredictionType,
    bounded,
    output_change_from_eps,
    output_change_from_x_0,
    predicted_x_0,
)


@dataclass(frozen=True)
class Prediction:
    """One denoising step in the denoiser's own parameterisation (ε, v or x_0).

    AMG's guidances are differences of predictions, which are linear: the paper's ε formulas hold
    for v with the model's output in place of ε.
    """

    x_t: Tensor  # Noisy samples (B, ...), variance preserving: √ᾱ·x_0 + √(1−ᾱ)·ε
    alpha_bar: Tensor  # ᾱ_t of this step, 0-d float32, from the scheduler; kept inside (0, 1)
    time: float  # Timestep over the number of training timesteps, in [0, 1]: 1 is noise
    output: Tensor  # The combined prediction, like x_t; the sampler steps with it
    output_cond: Tensor | None
    output_uncond: Tensor | None  # The unconditional branch; None where it is not needed (s_0 = 1)
    conditions: Conditions | None  # The user's y (B, ...): labels (B,) int64, or encoded prompts
    guidance_scale: float  # s_0 of classifier-free guidance; 1: the conditional branch alone
    prediction_type: PredictionType
    denoise: Callable[[Tensor, Conditions | None], Tensor]  # At this t: (x_t rows, y) → output
    guidance_rescale: float = 0.0  # Strength of ``rescaled``
    step: int = 0
    is_last: bool = False
    returned: tuple[Tensor, float | Tensor] | None = None
    """(offset, gain): the last step returns offset + gain·x̂_0; None: x̂_0. A gain like x_t is 0
    where an element does not follow the prediction, as outside of an inpainting mask."""
    finish: Callable[[Tensor], Tensor] | None = None
    """x̂_0 → what the last step returns, if that clips or thresholds; None: ``returned``."""
    clean_range: float | None = None  # With ``finish``: ``returned`` holds for x̂_0 in ±clean_range
    image_range: float | None = None  # Finished x_0 are clamped to ±image_range; pixels: 1
    decode: Callable[[Tensor], Tensor] = field(default=lambda x_0: x_0)  # x̂_0 → images in [−1, 1]
    encode: Encode | None = None
    memory: dict[Any, Any] = field(default_factory=dict)  # Of earlier steps, by guidance
    active: Tensor | None = None  # (B,) bool: rows that this step's guidances changed
    trace: dict[str, Tensor] = field(default_factory=dict)  # Columns (B,) of this step

    def __post_init__(self) -> None:
        # Zero terminal SNR, or no noise: guidances divide by √ᾱ and √(1−ᾱ).
        object.__setattr__(self, "alpha_bar", bounded(self.alpha_bar))

    def clean_estimate(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """x̂_0 of the combined prediction (eq. 12), not clamped, in float32."""
        return predicted_x_0(
            self.x_t[rows].float(), self.output[rows].float(), self.alpha_bar, self.prediction_type
        )

    def with_eps_change(self, delta_eps: Tensor, rows: Tensor) -> Prediction:
        """This record with ``delta_eps`` (len(rows), ...) added to ε̂ in those rows (eq. 10)."""
        change = output_change_from_eps(delta_eps, self.alpha_bar, self.prediction_type)
        return self.with_output_change(change, rows)

    def with_clean_change(self, delta_x_0: Tensor, rows: Tensor) -> Prediction:
        """This record with x̂_0 moved by ``delta_x_0`` (len(rows), ...) in those rows."""
        change = output_change_from_x_0(delta_x_0, self.alpha_bar, self.prediction_type)
        return self.with_output_change(change, rows)

    def with_output_change(self, change: Tensor, rows: Tensor) -> Prediction:
        """This record with ``change`` added to the output itself in those rows."""
        output = self.output.clone()
        output[rows] = self.output[rows] + change.to(output.dtype)
        return replace(self, output=output)

    def combined(
        self, cond: Tensor | None, uncond: Tensor | None, guidance_scale: float | None = None
    ) -> Tensor:
        """Branches (b, ...) combined as the sampler does, with s_0 or another scale."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self.as_stepped(combine(cond, uncond, scale), cond)

    def as_stepped(self, output: Tensor, cond: Tensor | None) -> Tensor:
        """A combination (b, ...) as the sampler steps with it: rescaled to ``cond`` if it does."""
        if self.guidance_rescale <= 0 or cond is None:
            return output
        return rescaled(output, cond, self.guidance_rescale)

    def with_branches(self, cond: Tensor | None, uncond: Tensor | None) -> Prediction:
        """This record with other branches, and their change of the combination added to ``output``.

        What earlier guidances changed stays. An ``output`` equal to the combination becomes the new
        one to the bit; an unchanged combination leaves ``output`` as it is.
        """
        before = self.combined(self.output_cond, self.output_uncond)
        after = self.combined(cond, uncond)
        output = torch.where(self.output == before, after, self.output + (after - before))
        return replace(self, output=output, output_cond=cond, output_uncond=uncond)

    def recorded(self, **columns: Tensor) -> Prediction:
        """This record with more trace columns, each (B,)."""
        return replace(self, trace={**self.trace, **columns})

    def recorded_at(self, rows: Tensor, **columns: Tensor) -> Prediction:
        """This record with values (len(rows),) of trace columns replaced in ``rows``."""
        trace = {
            name: self.trace[name].index_copy(0, rows, new.to(self.trace[name]))
            for name, new in columns.items()
        }
        return self.recorded(**trace)

    def activated(self, active: Tensor) -> Prediction:
        """This record with more active rows, (B,) bool."""
        return replace(self, active=active if self.active is None else self.active | active)


def combine(cond: Tensor | None, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: ε_u + s_0·(ε_c − ε_u); the branch itself where there is one."""
    if cond is None or uncond is None:
        only = uncond if cond is None else cond
        assert only is not None
        return only
    return uncond + guidance_scale * (cond - uncond)


def rescaled(output: Tensor, cond: Tensor, amount: float) -> Tensor:
    """``guidance_rescale`` (Lin et al., 2023, section 3.4), in the arithmetic of diffusers."""
    dimensions = list(range(1, output.ndim))
    ratio = cond.std(dim=dimensions, keepdim=True) / output.std(dim=dimensions, keepdim=True)
    return torch.as_tensor(amount * (output * ratio) + (1 - amount) * output)


class Guidance(Protocol):
    """Anything that changes a prediction: AMG, multiplicity guidance, an observer, a baseline."""

    def __call__(self, prediction: Prediction) -> Prediction:
        """Return the corrected record; rows without a correction keep their bits."""
        ...


def apply(guidance: Guidance | Sequence[Guidance] | None, prediction: Prediction) -> Prediction:
    """Pass the record down a list of guidances, in order."""
    if guidance is None:
        return prediction
    for change in guidance if isinstance(guidance, Sequence) else [guidance]:
        prediction = change(prediction)
    return prediction


def row_norm(change: Tensor) -> Tensor:
    """Euclidean norm of each row, (B, ...) → (B,)."""
    return torch.linalg.vector_norm(change.flatten(1).float(), dim=1)
