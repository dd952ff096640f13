"""Samplers keep the trained noise schedule and prediction type."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from memfree.sampling.checks import build_scheduler
from memfree.sampling.sample_run import SchedulerName


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_noise_schedule_is_kept(name):
    trained = DDPMScheduler(
        num_train_timesteps=200,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
    )
    made = build_scheduler(name, trained)
    assert torch.equal(made.alphas_cumprod, trained.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.get("use_karras_sigmas", False) == name.endswith("karras")
    made.set_timesteps(10)
    assert len(made.timesteps) == 10
