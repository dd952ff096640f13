"""The last correction reaches what a sampler returns, also where that is no clean estimate."""

import copy
import inspect
from functools import partial

import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from guard_parts import amg, copies, drawn, make_index

import memfree
from memfree.diffusion_math import alpha_bar_at, predicted_x_0
from memfree.pipeline_guard.noise_level import NoiseLevels
from memfree.sampling.last_step import LastStep

SCHEDULES = {
    "ddim": (DDIMScheduler, {}),
    "ddim to one": (DDIMScheduler, {"set_alpha_to_one": True}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "sa": (SASolverScheduler, {}),
    "dpmsolver": (DPMSolverMultistepScheduler, {}),
    "dpmsolver min": (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    "dpmsolver sde min": (
        DPMSolverMultistepScheduler,
        {"final_sigmas_type": "sigma_min", "algorithm_type": "sde-dpmsolver++"},
    ),
    "singlestep min": (DPMSolverSinglestepScheduler, {"final_sigmas_type": "sigma_min"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc min": (UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
}
CLEAN = ("ddim to one", "ddpm", "euler", "heun", "dpmsolver", "unipc")
"""Those whose last step returns x̂_0 itself."""


def schedule(name, **more):
    kind, config = SCHEDULES[name]
    if kind is DPMSolverSinglestepScheduler:  # it has no steps_offset
        config = {**tiny_pipelines.noise_schedule().config, **config}
        return kind.from_config({**config, "timestep_spacing": "linspace"}, **more)
    return tiny_pipelines.noise_schedule(kind, **{**config, **more})


class AtLastStep:
    """A scheduler before its last step, 20 steps of random predictions behind it."""

    def __init__(self, scheduler, dtype=torch.float32):
        self.scheduler = scheduler
        scheduler.set_timesteps(20)
        levels = NoiseLevels(scheduler, flow=False)
        self.generator = torch.Generator().manual_seed(0)
        self.takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self.sample = self.normal().to(dtype) * scheduler.init_noise_sigma
        for self.t in scheduler.timesteps:
            self.x_t = scheduler.scale_model_input(self.sample, self.t)
            level = levels.next(self.t)
            if level.is_last:
                break
            self.sample = self.step(self.normal().to(dtype), self.generator, scheduler)
        self.alpha_bar = level.alpha_bar

    def normal(self):
        return torch.randn(2, 4, 8, 8, generator=self.generator)

    def step(self, output, generator, scheduler=None):
        taken = scheduler or copy.deepcopy(self.scheduler)
        given = {"generator": generator} if self.takes_generator else {}
        return taken.step(output, self.t, self.sample, **given).prev_sample

    def x_0(self, output):
        kind = self.scheduler.config.prediction_type
        return predicted_x_0(self.x_t, output, self.alpha_bar, kind)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_scheduler_is_asked_what_it_will_return(name, prediction_type):
    last = AtLastStep(schedule(name, prediction_type=prediction_type))
    outputs = [last.normal(), last.normal()]
    before, state = str(last.scheduler.__dict__), torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    found = LastStep(
        last.scheduler, last.t, last.x_t, outputs[0], last.alpha_bar, generator=generator
    ).linear()
    assert str(last.scheduler.__dict__) == before and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    assert (found is None) == (name in CLEAN)
    for said in outputs:
        offset, gain = found or (0.0, 1.0)
        expected = last.step(said, torch.Generator().manual_seed(5))
        torch.testing.assert_close(offset + gain * last.x_0(said), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "deis", "dpmsolver min"])
def test_a_broken_sample_leaves_the_others_of_its_batch_theirs(name):
    last = AtLastStep(schedule(name))
    output = last.normal()
    offset, gain = LastStep(last.scheduler, last.t, last.x_t, output, last.alpha_bar).linear()
    broken = output.clone()
    broken[0] = torch.nan
    found = LastStep(last.scheduler, last.t, last.x_t, broken, last.alpha_bar).linear()
    assert found[1] == pytest.approx(gain, rel=1e-4)
    torch.testing.assert_close(found[0][1], offset[1], atol=1e-4, rtol=1e-4)


def test_a_broken_sample_leaves_an_exact_last_step_exact():
    last = AtLastStep(schedule("euler"))
    output = last.normal()
    output[0] = torch.nan
    assert LastStep(last.scheduler, last.t, last.x_t, output, last.alpha_bar).linear() is None


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_broken_sample_does_not_hide_that_the_last_step_is_idle(final):
    scheduler = schedule("euler", final_sigmas_type=final, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(output, t, x).prev_sample
    t, *idle = scheduler.timesteps[2:]
    output[0] = torch.nan
    alpha_bar = alpha_bar_at(scheduler, t, 2)
    step = LastStep(scheduler, t, x, output, alpha_bar, idle=idle)
    assert step.is_last() == (final == "sigma_min")


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "ddpm", "dpmsolver sde min"])
@pytest.mark.parametrize("seeded", [True, False])
def test_torchs_generators_stay_with_other_threads_where_a_step_cannot_draw(
    name, seeded, monkeypatch
):
    last, moved = AtLastStep(schedule(name)), []
    monkeypatch.setattr(torch, "set_rng_state", moved.append)
    generator = torch.Generator().manual_seed(5) if seeded else None
    said = last.normal()
    LastStep(last.scheduler, last.t, last.x_t, said, last.alpha_bar, generator=generator).linear()
    assert bool(moved) == (not seeded and name not in ("ddim", "pndm"))


def test_a_step_that_goes_nowhere_has_no_gain():
    last = AtLastStep(schedule("euler", final_sigmas_type="sigma_min", timestep_spacing="linspace"))
    output = last.normal()
    offset, gain = LastStep(last.scheduler, last.t, last.x_t, output, last.alpha_bar).linear()
    assert gain == 0
    torch.testing.assert_close(offset, last.step(output, None), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*CLEAN, "lms", "deis", "unipc min", "dpmsolver min"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_returned_is_known_in_half_precision(name, dtype):
    last = AtLastStep(schedule(name), dtype)
    output = last.normal().to(dtype)
    found = LastStep(last.scheduler, last.t, last.x_t, output, last.alpha_bar).linear()
    assert (found is None) == (name in CLEAN)
    if found is not None:
        offset, gain = found
        exact = AtLastStep(schedule(name))
        said = exact.normal()
        *_, wanted = LastStep(exact.scheduler, exact.t, exact.x_t, said, exact.alpha_bar).linear()
        assert gain == pytest.approx(wanted, abs=2e-3) and offset.dtype == torch.float32


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
    offset, gain = LastStep(scheduler, t, x, output, alpha_bar, eta).linear()
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
    offset, gain = LastStep(scheduler, t, x, output, alpha_bar).linear()
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
    offset, gain = LastStep(scheduler, t, x, outputs[0], alpha_bar, 0.8, generator).linear()
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
    before, t = torch.get_rng_state(), scheduler.timesteps[-1]
    assert LastStep(scheduler, t, x, output, alpha_bar_at(scheduler, t, 5)).linear() is None
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


CLIPPING = {
    "ddim": (DDIMScheduler, {"thresholding": True, "set_alpha_to_one": True}),
    "ddim of sd": (DDIMScheduler, {"thresholding": True}),
    "ddim clip": (DDIMScheduler, {"clip_sample": True}),
    "ddpm": (DDPMScheduler, {"thresholding": True}),
    "ddpm clip": (DDPMScheduler, {"clip_sample": True, "clip_sample_range": 0.5}),
    "deis": (DEISMultistepScheduler, {"thresholding": True}),
    "dpmsolver": (DPMSolverMultistepScheduler, {"thresholding": True}),
    "dpmsolver max": (DPMSolverMultistepScheduler, {"thresholding": True, "sample_max_value": 3.0}),
    "dpmsolver below 1": (
        DPMSolverMultistepScheduler,
        {"thresholding": True, "sample_max_value": 0.5},
    ),
    "dpmsolver sde": (
        DPMSolverMultistepScheduler,
        {"thresholding": True, "algorithm_type": "sde-dpmsolver++", "euler_at_final": True},
    ),
    "dpmsolver min": (
        DPMSolverMultistepScheduler,
        {"thresholding": True, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "heun clip": (HeunDiscreteScheduler, {"clip_sample": True}),
    "unipc": (UniPCMultistepScheduler, {"thresholding": True}),
    "unipc min": (
        UniPCMultistepScheduler,
        {"thresholding": True, "final_sigmas_type": "sigma_min"},
    ),
    "sa": (SASolverScheduler, {"thresholding": True}),
    "lcm": (LCMScheduler, {"thresholding": True, "original_inference_steps": 50}),
}


@pytest.mark.parametrize("name", list(CLIPPING))
def test_no_copy_remains_where_the_scheduler_clips_the_clean_estimate(name):
    kind, config = CLIPPING[name]
    pipe = tiny_pipelines.stable_diffusion(tiny_pipelines.noise_schedule(kind, **config))
    assert copies(pipe) == (20, 0)
    only_last = partial(amg, threshold=1.0, c3=0.0, final_correction=-0.2)
    assert copies(pipe, guidance=only_last) == (20, 0)


FLOW = {
    "deis": (DEISMultistepScheduler, {}),
    "dpmsolver": (DPMSolverMultistepScheduler, {}),
    "dpmsolver min": (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    "dpmsolver high": (DPMSolverMultistepScheduler, {"lower_order_final": False}),
    "dpmsolver 3": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmsolver sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver thresholding": (DPMSolverMultistepScheduler, {"thresholding": True}),
    "singlestep": (DPMSolverSinglestepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc min": (UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    "sa": (SASolverScheduler, {}),
    "euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "euler stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "heun": (FlowMatchHeunDiscreteScheduler, {}),
}


@pytest.mark.parametrize("name", list(FLOW))
def test_no_copy_remains_under_flow_matching(name):
    kind, config = FLOW[name]
    if "FlowMatch" not in kind.__name__:
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **config}
    pipe = tiny_pipelines.stable_diffusion_3(kind(**config))
    only_last = partial(amg, threshold=1.0, c3=0.0, final_correction=-0.2)
    assert copies(pipe, guidance=only_last, max_sequence_length=16) == (20, 0)


def test_the_report_says_where_nothing_can_be_corrected():
    """One step that goes nowhere."""
    scheduler = schedule("euler", final_sigmas_type="sigma_min", timestep_spacing="linspace")
    pipe = tiny_pipelines.stable_diffusion(scheduler)
    expected = drawn(pipe, num_inference_steps=1)
    index = make_index(2 * expected[:1] - 1)
    only_last = amg(index, 1.0, c3=0.0, final_correction=-0.2)
    with memfree.guard(pipe, index, only_last) as report:
        assert torch.equal(drawn(pipe, num_inference_steps=1), expected)
    assert report.unmoved == [0]
    assert "last correction was left out in 1 of 1 calls" in " ".join(str(report).split())
    assert report.verdicts[0].similarity > -0.2
    pipe.scheduler = schedule("euler")
    with memfree.guard(pipe, index, only_last) as report:
        drawn(pipe)
    assert not report.unmoved and "left out" not in str(report)


def test_a_last_step_that_goes_nowhere_leaves_the_correction_to_the_one_before():
    scheduler = schedule("euler", final_sigmas_type="sigma_min", timestep_spacing="linspace")
    pipe, index, seen = tiny_pipelines.stable_diffusion(scheduler), make_index(), []
    with memfree.guard(pipe, index, lambda prediction: seen.append(prediction) or prediction):
        latents = drawn(pipe, output_type="latent")
    assert [one.is_last for one in seen] == [False, False, True, False]
    offset, gain = seen[2].returned
    expected = offset + gain * seen[2].clean_estimate()
    torch.testing.assert_close(expected, latents, atol=1e-3, rtol=1e-4)
    only_last = partial(amg, threshold=1.0, c3=0.0, final_correction=-0.2)
    assert copies(pipe, guidance=only_last) == (20, 0)


def test_a_guard_knows_what_noisy_ddim_will_return():
    pipe, index, seen = tiny_pipelines.stable_diffusion(schedule("ddim")), make_index(), []
    with memfree.guard(pipe, index, lambda prediction: seen.append(prediction) or prediction):
        latents = drawn(pipe, eta=1.0, output_type="latent")
    offset, gain = seen[-1].returned
    x_0 = seen[-1].clean_estimate()
    torch.testing.assert_close(offset + gain * x_0, latents, atol=1e-4, rtol=1e-4)
