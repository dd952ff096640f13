"""The last correction reaches what a sampler returns, also where that is no clean estimate."""

import copy

import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from guard_parts import amg, drawn, make_index

import memfree
from memfree.diffusion_math import alpha_bar_at, predicted_x_0
from memfree.sampling.last_step import returned

SCHEDULES = {
    "ddim": (DDIMScheduler, {}),
    "ddim to one": (DDIMScheduler, {"set_alpha_to_one": True}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmsolver": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def schedule(name, **more):
    kind, config = SCHEDULES[name]
    return tiny_pipelines.noise_schedule(kind, **{**config, **more})


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_a_step_with_eta_and_no_given_noise_is_followed(eta):
    """TCD's own default for eta is 0.3; its last step adds no noise."""
    scheduler = tiny_pipelines.noise_schedule(TCDScheduler, set_alpha_to_one=False)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=generator)
    t = scheduler.timesteps[-1]
    scheduler.step(output, scheduler.timesteps[0], x, eta=eta)
    scheduler._step_index = 3
    alpha_bar = alpha_bar_at(scheduler, t, 3)
    offset, gain = returned(scheduler, t, x, output, alpha_bar, eta)
    expected = copy.deepcopy(scheduler).step(output, t, x, eta=eta).prev_sample
    x_0 = predicted_x_0(x, output, alpha_bar, "epsilon")
    torch.testing.assert_close(offset + gain * x_0, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_offset_and_gain_are_those_of_the_schedulers_own_step(name, prediction_type):
    scheduler = schedule(name, prediction_type=prediction_type)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    x, *outputs = torch.randn(20, 2, 4, 8, 8, generator=generator)
    for t, output in zip(scheduler.timesteps[:-1], outputs, strict=False):
        x = scheduler.step(output, t, x).prev_sample
    t, output, other = scheduler.timesteps[-1], *outputs[-2:]
    alpha_bar = alpha_bar_at(scheduler, t, len(scheduler.timesteps) - 1)
    before = copy.deepcopy(scheduler.__dict__)
    offset, gain = returned(scheduler, t, x, output, alpha_bar)
    assert str(scheduler.__dict__) == str(before)
    for said in (output, other):
        x_0 = predicted_x_0(x, said, alpha_bar, prediction_type)
        expected = copy.deepcopy(scheduler).step(said, t, x).prev_sample
        torch.testing.assert_close(offset + gain * x_0, expected, atol=1e-4, rtol=1e-4)
    assert abs(gain - 1) > 0.2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seeded", [True, False])
def test_the_noise_that_ddim_adds_is_known_before_it_is_drawn(prediction_type, dtype, seeded):
    scheduler = schedule("ddim", prediction_type=prediction_type)
    scheduler.set_timesteps(6)
    x, *outputs = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    t, alpha_bar = scheduler.timesteps[-1], alpha_bar_at(scheduler, scheduler.timesteps[-1], 5)
    generator = [torch.Generator().manual_seed(i) for i in range(2)] if seeded else None
    before = torch.get_rng_state()
    offset, gain = returned(scheduler, t, x, outputs[0], alpha_bar, 0.8, generator)
    assert torch.equal(torch.get_rng_state(), before)
    exact = []
    for said in outputs:
        # What the pipeline will do, of which the noise alone has its precision.
        torch.set_rng_state(before)
        noise = randn_tensor(x.shape, copy.deepcopy(generator), x.device, dtype).float()
        step = scheduler.step(said.float(), t, x.float(), eta=0.8, variance_noise=noise)
        x_0 = predicted_x_0(x.float(), said.float(), alpha_bar, prediction_type)
        torch.testing.assert_close(offset + gain * x_0, step.prev_sample, atol=1e-4, rtol=1e-4)
        exact.append(step.prev_sample)
    torch.set_rng_state(before)
    done = scheduler.step(outputs[0], t, x, eta=0.8, generator=generator).prev_sample
    torch.testing.assert_close(
        done.float(), exact[0], atol=5e-5 if dtype == torch.float32 else 0.1, rtol=0
    )


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_options_of_another_class_are_not_the_schedulers_own(kind):
    scheduler = kind.from_config(schedule("pndm").config)
    assert scheduler.config["set_alpha_to_one"] is False  # PNDM's, kept by diffusers
    scheduler.set_timesteps(6)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert returned(scheduler, scheduler.timesteps[-1], x, output, torch.tensor(0.99)) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_no_finished_image_is_above_the_last_corrections_target(name):
    pipe = tiny_pipelines.stable_diffusion(schedule(name))
    expected = drawn(pipe, num_inference_steps=10)
    index = make_index(2 * expected[:1] - 1)
    only_last = amg(index, 1.0, c3=0.0, final_correction=-0.2)
    with memfree.guard(pipe, index, only_last) as report:
        images = drawn(pipe, num_inference_steps=10)
    assert report.verdicts[0].nearest == "img0" and not torch.equal(images[0], expected[0])
    assert max(one.similarity for one in report.verdicts) <= -0.2


def test_a_guard_knows_what_noisy_ddim_will_return():
    pipe, index, seen = tiny_pipelines.stable_diffusion(schedule("ddim")), make_index(), []
    with memfree.guard(pipe, index, lambda prediction: seen.append(prediction) or prediction):
        latents = drawn(pipe, eta=1.0, output_type="latent")
    offset, gain = seen[-1].returned
    x_0 = seen[-1].clean_estimate()
    torch.testing.assert_close(offset + gain * x_0, latents, atol=1e-4, rtol=1e-4)
