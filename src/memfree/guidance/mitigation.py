"""The stages of a mitigation: prompt, embedding, initial noise, network, prediction, afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memfree.conditions import TextConditions
from memfree.diffusion_math import PredictionType, eps_change
from memfree.guidance.prediction import Guidance


@dataclass(frozen=True)
class Start:
    """What is known before the first denoising step of a batch of text-to-image samples."""

    noise: Tensor
    """x_T (B, C, H, W), standard normal."""
    conditions: TextConditions
    """The encoded prompts, (B, ...)."""
    unconditional: TextConditions
    """The encoded empty (or negative) prompt of each sample, (B, ...)."""
    denoise: Callable[[Tensor, TextConditions], Tensor]
    """The denoiser at the first timestep: (x_T (b, ...), conditions (b, ...)) → output like x_T.
    Gradients flow through it where they are enabled."""
    alpha_bar: Tensor
    """ᾱ of the first timestep, 0-d float32."""
    prediction_type: PredictionType
    """What the output is, as in ``scheduler.config.prediction_type``."""
    guidance_scale: float
    """s_0 of classifier-free guidance."""
    generators: Sequence[torch.Generator]
    """One CPU generator a sample, for all that a mitigation draws; never the global one."""

    def eps_difference(self, noise: Tensor, conditions: TextConditions) -> Tensor:
        """ε_θ(x_T, y) − ε_θ(x_T) (B, C, H, W), whose norm is large for memorized prompts (Wen)."""
        difference = self.denoise(noise, conditions) - self.denoise(noise, self.unconditional)
        return eps_change(difference, self.alpha_bar, self.prediction_type)


class Mitigation:
    """A way to keep a model from copying: six stages, each of which changes nothing by default.

    The sampling module, the guard and studies run the stages in the order of this class. Stages
    act on a whole batch and leave samples independent of each other.
    """

    def prompts(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[str]:
        """Change the prompts of a batch; one generator a sample."""
        return list(prompts)

    def embedding(self, start: Start) -> TextConditions:
        """Change the encoded prompts."""
        return start.conditions

    def initial_noise(self, start: Start) -> Tensor:
        """Change x_T."""
        return start.noise

    def changes_start(self) -> bool:
        """Whether the embedding or the initial noise may be changed, which takes a ``Start``."""
        own = type(self)
        return (
            own.embedding is not Mitigation.embedding
            or own.initial_noise is not Mitigation.initial_noise
        )

    def guidance_scale(self, guidance_scale: float) -> float:
        """Change s_0."""
        return guidance_scale

    def around(self, network: Any) -> AbstractContextManager[Any]:
        """Change the network (a diffusers model) while samples are drawn."""
        return nullcontext()

    def guidances(self) -> list[Guidance]:
        """Change the prediction of every step, in order."""
        return []

    def accept(self, images: Tensor) -> Tensor:
        """(B,) bool: which finished images (B, C, H, W) in [−1, 1] are kept; others are redrawn."""
        return torch.ones(len(images), dtype=torch.bool, device=images.device)
