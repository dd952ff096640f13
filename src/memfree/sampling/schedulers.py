"""Samplers by name, each with the noise schedule and prediction type of the trained scheduler."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from memfree.sampling.options import SchedulerName

_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    # Clamping x̂_0 alone leaves DDIM's ε̂ behind: under classifier-free guidance samples go astray.
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmsolver++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def build_scheduler(name: SchedulerName, trained: Any) -> Any:
    """A diffusers scheduler for sampling.

    Args:
        name: ``ddpm`` (ancestral), ``ddim`` (deterministic), ``dpmsolver++`` (multistep, second
            order; ``-karras``: with Karras sigmas), ``euler`` or ``unipc``.
        trained: the scheduler that the model was trained with; its betas, prediction type and
            spacing are taken over.
    """
    kind, changes = _CLASSES[name]
    return kind.from_config(trained.config, **changes)
