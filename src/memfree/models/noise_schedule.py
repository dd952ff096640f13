"""The noise schedule of training, as options and as a diffusers scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from memfree.models.options import NoiseOptions


def build_scheduler(options: NoiseOptions) -> Any:
    """Build the diffusers scheduler that ``options`` describe.

    Raises:
        ValueError: diffusers has no such scheduler, or it does not work with cumulative alphas
            (flow matching, and schedulers that are trained on continuous noise levels).
    """
    scheduler_class: Any = scheduler_class_named(options.scheduler)
    wanted: dict[str, Any] = {
        "num_train_timesteps": options.num_train_timesteps,
        "beta_schedule": options.beta_schedule,
        "beta_start": options.beta_start,
        "beta_end": options.beta_end,
        "prediction_type": options.prediction_type,
        "clip_sample": options.clip_sample,
    }
    known = inspect.signature(scheduler_class.__init__).parameters
    missing = [name for name in wanted if name not in known and name != "clip_sample"]
    if missing:
        raise ValueError(
            f"--model.noise.scheduler {options.scheduler} has no {missing[0]}: choose one such as "
            "DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler"
        )
    try:
        scheduler = scheduler_class(**{k: v for k, v in wanted.items() if k in known})
    except NotImplementedError as error:
        raise ValueError(
            f"--model.noise.beta_schedule {options.beta_schedule} is not known to "
            f"{options.scheduler}: {error}"
        ) from error
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"--model.noise.scheduler {options.scheduler} has no alphas_cumprod")
    return scheduler


def scheduler_class_named(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler class of this name.

    Raises:
        ValueError: diffusers has none, so that a file cannot name any other class.
    """
    # Names without "Scheduler" are not looked up: attributes of diffusers import lazily.
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler called {name!r}")
    return found
