"""The guard under every scheduler: noise levels, steps, and a guided loop written by hand."""

import copy

import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from guard_parts import (
    NEVER,
    PROMPTS,
    ActiveRows,
    amg,
    copies,
    drawn,
    noise,
    options,
    random_images,
    refused,
)

import memfree

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_noise_level_is_the_schedulers_whatever_it_is(index, kind, prediction):
    """A model that predicts the noise of a known image: its clean estimate is that image."""
    pipe = tiny_pipelines.stable_diffusion(
        tiny_pipelines.noise_schedule(kind, prediction_type=prediction)
    )
    observed = ActiveRows([0], 0.0)
    with memfree.guard(pipe, index, observed):
        pipe(PROMPTS, **options("stable_diffusion"))
    levels = torch.stack([one.alpha_bar for one in observed.seen])
    scheduler = kind.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    assert len(levels) == len(scheduler.timesteps)
    # Schedules between two timesteps are interpolated in log σ: compare at the timesteps.
    curve = scheduler.alphas_cumprod.double()
    at = torch.tensor([float(t) for t in scheduler.timesteps], dtype=torch.float64)
    low, high = at.floor().long(), at.ceil().long().clamp(max=999)
    logs = ((1 - curve) / curve).log() / 2
    sigma = (logs[low] + (at - low) * (logs[high] - logs[low])).exp()
    torch.testing.assert_close(levels.double(), 1 / (1 + sigma**2), rtol=2e-2, atol=1e-6)
    assert [one.is_last for one in observed.seen] == [False] * (len(levels) - 1) + [True]
    assert [one.step for one in observed.seen] == list(range(len(levels)))


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_image_to_image_begins_within_the_schedule(index, kind):
    pipe = tiny_pipelines.stable_diffusion_img2img(tiny_pipelines.noise_schedule(kind))
    observed = ActiveRows([0], 0.0)
    call = {**options("stable_diffusion_img2img"), "num_inference_steps": 6, "strength": 0.5}
    with memfree.guard(pipe, index, observed):
        pipe(PROMPTS, **call)
    scheduler = pipe.scheduler
    t = scheduler.timesteps[-len(observed.seen)]
    assert float(observed.seen[0].time) == pytest.approx(float(t) / 1000)
    expected = float(scheduler.alphas_cumprod[round(float(t))])
    assert float(observed.seen[0].alpha_bar) == pytest.approx(expected, rel=5e-2)
    assert [one.is_last for one in observed.seen] == [False] * (len(observed.seen) - 1) + [True]


REPEATED = {
    "pndm at 0.8": (PNDMScheduler, {"skip_prk_steps": True}, 0.8),
    "pndm at 1": (PNDMScheduler, {"skip_prk_steps": True}, 1.0),
    "pndm one step": (PNDMScheduler, {"skip_prk_steps": True}, 0.1),
    "prk at 0.7": (PNDMScheduler, {"skip_prk_steps": False}, 0.7),
    "prk at 0.9": (PNDMScheduler, {"skip_prk_steps": False}, 0.9),
    "heun": (HeunDiscreteScheduler, {}, 0.8),
    "kdpm2": (KDPM2DiscreteScheduler, {}, 0.8),
    "deis": (DEISMultistepScheduler, {}, 0.8),
    "unipc": (UniPCMultistepScheduler, {}, 0.5),
}


@pytest.mark.parametrize("name", list(REPEATED))
def test_no_copy_remains_where_image_to_image_enters_at_a_repeated_timestep(name):
    kind, config, strength = REPEATED[name]
    pipe = tiny_pipelines.stable_diffusion_img2img(tiny_pipelines.noise_schedule(kind, **config))
    image = random_images(20, 3) / 2 + 0.5
    assert copies(pipe, image=image, strength=strength) == (20, 0)


@pytest.mark.parametrize("steps", [2, 3, 4, 10])
@pytest.mark.parametrize("skip", [True, False])
def test_the_last_step_of_pndm_is_known_at_every_strength(index, steps, skip):
    """At two steps the schedule ends with the timestep that it repeats."""
    scheduler = tiny_pipelines.noise_schedule(PNDMScheduler, skip_prk_steps=skip)
    pipe = tiny_pipelines.stable_diffusion_img2img(scheduler)
    for tenth in range(1, 11):
        if not skip and steps < 4:
            continue  # Runge-Kutta needs four
        observed = ActiveRows([0], 0.0)
        call = {"num_inference_steps": steps, "strength": max(tenth / 10, 1 / steps)}
        with memfree.guard(pipe, index, observed):
            pipe(PROMPTS, **{**options("stable_diffusion_img2img"), **call})
        assert len(observed.seen) == pipe.num_timesteps
        last = [one.is_last for one in observed.seen]
        assert last == [False] * (len(last) - 1) + [True]


@pytest.mark.parametrize("kind", [DDIMInverseScheduler, DPMSolverMultistepInverseScheduler])
def test_schedulers_that_do_not_count_from_a_beginning_are_followed(index, kind):
    pipe = tiny_pipelines.stable_diffusion(tiny_pipelines.noise_schedule(kind))
    plain = drawn(pipe)
    with memfree.guard(pipe, index, amg(index, NEVER)) as report:
        assert torch.equal(drawn(pipe), plain)
    assert len(report.trace) == 8


def test_a_pipeline_whose_denoiser_is_called_off_schedule_is_refused(index):
    class Twice(StableDiffusionPipeline):
        def progress_bar(self, *args, **kwargs):
            self.unet(torch.zeros(4, 4, 8, 8), 3, encoder_hidden_states=torch.zeros(4, 16, 32))
            return super().progress_bar(*args, **kwargs)

    pipe = tiny_pipelines.stable_diffusion(kind=Twice)
    with (
        memfree.guard(pipe, index, ActiveRows([0])),
        refused("call 1 of the denoiser is at timestep 3"),
    ):
        pipe(PROMPTS, **options(""))


class Karras(DPMSolverMultistepScheduler):
    """DPM-Solver++ (2M) with Karras' sigmas."""

    def __init__(self, **config):
        super().__init__(**{"use_karras_sigmas": True, **config})


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, Karras])
def test_active_rows_equal_a_guided_loop_written_by_hand(index, kind):
    """In float32, bit for bit: the pipeline's own loop with the prediction corrected in place."""
    from diffusers import DPMSolverMultistepScheduler as Solver

    made = tiny_pipelines.noise_schedule
    scheduler = made(Solver, use_karras_sigmas=True) if kind is Karras else made(kind)
    pipe = tiny_pipelines.stable_diffusion(scheduler)
    guidance = amg(index, c3=30.0, max_displacement=0.5)
    with memfree.guard(pipe, index, guidance):
        images = pipe(PROMPTS, guidance_scale=4.0, **options("")).images
    expected = by_hand(pipe, copy.deepcopy(scheduler), index, 4.0)
    assert torch.equal(images, expected)


@torch.no_grad()
def by_hand(pipe, scheduler, index, scale, steps=4):
    """Equations 8, 10, 12 and 17, written out for ε prediction and pixel similarity."""
    embeddings, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    both = torch.cat([empty, embeddings])
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in noise()])
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, t)
        output = pipe.unet(torch.cat([x_in] * 2), t, encoder_hidden_states=both).sample
        uncond, cond = output.chunk(2)
        eps = uncond + scale * (cond - uncond)
        if hasattr(scheduler, "sigmas"):
            a = (1 / (1 + scheduler.sigmas[i].double() ** 2)).float()
        else:
            a = scheduler.alphas_cumprod[t]
        with torch.enable_grad():
            x_0 = ((x_in - (1 - a).sqrt() * eps) / a.sqrt()).requires_grad_()
            decoded = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample.flatten(1)
            if i == steps - 1:  # the image as the pipeline returns it
                decoded = decoded.clamp(-1, 1)
            distances = torch.cdist(decoded.detach().double(), index.vectors.double())
            nearest = distances.topk(50, largest=False)
            gaps = decoded[:, None] - index.vectors[nearest.indices]
            spread = torch.linalg.vector_norm(gaps.detach(), dim=2).mean(1)
            sigma = -torch.linalg.vector_norm(gaps[:, 0], dim=1) / (0.5 * spread)
            gradient = torch.autograd.grad(sigma.sum(), x_0)[0] / a.sqrt()
        g_sim = 30.0 * (1 - a).sqrt() * gradient
        moved = g_sim.flatten(1).square().mean(1).sqrt() * ((1 - a) / a).sqrt()
        g_sim = (0.5 / moved).clamp(max=1)[:, None, None, None] * g_sim
        x = scheduler.step(eps + g_sim, t, x).prev_sample
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1)
