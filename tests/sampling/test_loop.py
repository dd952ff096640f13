"""The denoising loop against plain diffusers, bit for bit, and guidance under every scheduler."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from memfree.diffusion_math import alpha_bar_at
from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    MultiplicityGuidance,
    NormalizedL2,
    Observer,
    SteadyAMG,
)
from memfree.retrieval import ReferenceIndex
from memfree.sampling import sample
from memfree.sampling.noise import draw, generators, initial_noise

SCHEDULERS = {
    "ddpm": lambda **kw: DDPMScheduler(**kw),
    "ddim": lambda **kw: DDIMScheduler(clip_sample=False, **kw),
    "dpmsolver++-karras": lambda **kw: DPMSolverMultistepScheduler(use_karras_sigmas=True, **kw),
    "euler": lambda **kw: EulerDiscreteScheduler(**kw),
    "unipc": lambda **kw: UniPCMultistepScheduler(**kw),
    "pndm": lambda **kw: PNDMScheduler(**kw),
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def denoiser(network):
    def denoise(x_t, t, conditions):
        labels = torch.full((len(x_t),), 3) if conditions is None else conditions
        return network(x_t, t, class_labels=labels).sample

    return denoise


@pytest.fixture(scope="module")
def index():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(70, 1, 8, 8, generator=generator) * 2 - 1
    counts = torch.ones(70, dtype=torch.int64)
    counts[:5] = 20
    return ReferenceIndex.build(images, labels=torch.arange(70) % 3, counts=counts)


def plain_loop(network, scheduler, noise, steps, sources, labels, guidance_scale):
    """What a diffusers user writes by hand."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        output = network(x_in, t, class_labels=labels).sample
        if guidance_scale != 1:
            null = network(x_in, t, class_labels=torch.full_like(labels, 3)).sample
            output = null + guidance_scale * (output - null)
        kwargs = {"generator": sources} if isinstance(scheduler, DDPMScheduler) else {}
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_unguided_and_never_active_equal_plain_diffusers_bit_for_bit(
    network, denoiser, index, name, guidance_scale
):
    labels = torch.tensor([0, 1, 2, 0])

    def starts():
        sources = generators(7, range(4))
        return draw((1, 8, 8), sources), sources

    noise, sources = starts()
    expected = plain_loop(network, SCHEDULERS[name](), noise, 6, sources, labels, guidance_scale)
    never = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(0.0), c1=1.0, c2=1.0, c3=9.0
    )
    for guidance in (None, Observer(index, NormalizedL2(), ConstantThreshold(0.0)), never):
        noise, sources = starts()
        result = sample(
            denoiser, SCHEDULERS[name](), noise, 6, guidance, labels, guidance_scale, True, sources
        )
        assert torch.equal(result.images, expected)


def copying_denoiser(index, scheduler):
    """A model that has memorized: its clean estimate is a training image, by turns."""

    def denoise(x_t, t, conditions):
        x_0 = index.vectors[torch.arange(len(x_t)) % 5].reshape(x_t.shape)
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        if scheduler.config.prediction_type == "epsilon":
            return eps
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    return denoise


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "pndm"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_acts_under_every_scheduler_and_parameterisation(index, name, kind):
    scheduler = SCHEDULERS[name](prediction_type=kind)
    copying = copying_denoiser(index, scheduler)
    noise = initial_noise(0, range(5), (1, 8, 8))
    similarity = NormalizedL2()
    steering = SteadyAMG(index, similarity, ConstantThreshold(-0.7), c3=20.0, max_displacement=0.3)
    corrected = SteadyAMG(index, similarity, ConstantThreshold(0.0), final_correction=-0.7)

    def final(guidance):
        result = sample(copying, scheduler, noise, 8, guidance, trace=True)
        return similarity(index, result.images.clamp(-1, 1)).sigma, result.trace

    unguided, _ = final(None)
    assert (unguided > -0.2).all()
    steered, trace = final([MultiplicityGuidance(index), steering])
    assert (steered < unguided).all()
    assert trace["active"].any() and (trace["g_sim_norm"] > 0).any()
    assert (trace["g_mul_norm"] > 0).any()
    # The last correction holds in what the sampler returns, not only in its last estimate.
    assert (final(corrected)[0] <= -0.7 + 1e-3).all()


@pytest.mark.parametrize("name", ["euler", "dpmsolver++-karras", "unipc"])
def test_noise_level_comes_from_the_schedulers_sigmas(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(7)
    for step, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])
        assert alpha_bar_at(scheduler, t, step).item() == pytest.approx(1 / (1 + sigma**2))


@pytest.mark.parametrize("kind", [KDPM2DiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_noise_level_is_that_of_the_sample_also_at_midpoints(kind, spacing):
    """Where the noise is predicted exactly, x_t = √ᾱ·x_0 + √(1−ᾱ)·ε with one x_0 at all steps."""
    eps, seen = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []
    scheduler = kind(timestep_spacing=spacing, beta_schedule="scaled_linear")

    def watched(prediction):
        seen.append(prediction.clean_estimate())
        return prediction

    sample(lambda x, t, y: eps.clone(), scheduler, eps, 12, watched)
    error = torch.stack([(x_0 - seen[0]).abs().max() for x_0 in seen])
    assert float(error.max()) < 2e-3 * max(1.0, float(seen[0].abs().max()))


def test_the_noise_level_of_dpmsolver_sde_is_that_of_its_midpoints(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))  # makes its noise
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_: lambda *_: 0.0)
    scheduler = module.DPMSolverSDEScheduler()
    scheduler.set_timesteps(5)
    x = torch.ones(1)
    for step, t in enumerate(scheduler.timesteps[:-1]):
        sigma = scheduler.mid_point_sigma if step % 2 else scheduler.sigmas[step]
        scheduler.scale_model_input(x, t)
        assert alpha_bar_at(scheduler, t, step).item() == pytest.approx(1 / (1 + sigma**2))
        x = scheduler.step(x, t, x).prev_sample


def test_noise_level_of_ancestral_samplers_is_that_of_the_timestep():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(7)
    betas = np.linspace(1e-4, 0.02, 1000)
    for step, t in enumerate(scheduler.timesteps):
        expected = np.prod(1 - betas[: int(t) + 1])
        assert alpha_bar_at(scheduler, t, step).item() == pytest.approx(expected, rel=1e-4)


def test_sample_depends_on_seed_and_index_alone(denoiser, index):
    guidance = [
        MultiplicityGuidance(index),
        AntiMemorizationGuidance(index, NormalizedL2(), ConstantThreshold(-1.5), c1=1.0, c3=5.0),
    ]

    def made(indices):
        sources = generators(3, indices)
        noise = draw((1, 8, 8), sources)
        y = torch.tensor([i % 3 for i in indices])
        return sample(
            denoiser, DDPMScheduler(), noise, 5, guidance, y, 2.0, generators=sources
        ).images

    whole = made(range(6))
    parts = torch.cat([made([0]), made([1, 2, 3]), made([4, 5])])
    torch.testing.assert_close(whole, parts, atol=1 / 255, rtol=0)
    assert torch.equal(
        initial_noise(3, [4], (1, 8, 8))[0], initial_noise(3, range(6), (1, 8, 8))[4]
    )
    assert not torch.equal(initial_noise(3, [4], (1, 8, 8)), initial_noise(4, [4], (1, 8, 8)))


def test_the_scheduler_is_not_changed_and_the_trace_has_a_row_a_sample_and_step(denoiser, index):
    scheduler = DDIMScheduler()
    observer = Observer(index, NormalizedL2(), ConstantThreshold(-0.7))
    result = sample(
        denoiser, scheduler, initial_noise(0, range(3), (1, 8, 8)), 4, observer, trace=True
    )
    assert scheduler.num_inference_steps is None
    assert result.trace["sample"].tolist() == [0, 1, 2] * 4
    assert result.trace["step"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert not result.trace["active"].any()
    assert torch.isfinite(result.trace["sigma"]).all()
    assert torch.isnan(result.trace["g_sim_norm"]).all()


def test_nan_is_one_clear_error():
    def broken(x_t, t, conditions):
        return x_t * float("nan")

    with pytest.raises(ValueError, match="NaN"):
        sample(broken, DDIMScheduler(), torch.zeros(1, 1, 8, 8), 2)


def test_works_inside_inference_mode(denoiser, index):
    guidance = SteadyAMG(
        index, NormalizedL2(), ConstantThreshold(-2.0), c3=1.0, final_correction=-1.0
    )
    noise = initial_noise(0, range(2), (1, 8, 8))
    y = torch.tensor([0, 1])
    outside = sample(denoiser, DDIMScheduler(), noise, 4, guidance, y, 2.0).images
    with torch.inference_mode():
        inside = sample(denoiser, DDIMScheduler(), noise, 4, guidance, y, 2.0).images
    assert torch.equal(outside, inside)


def test_mixed_precision_is_for_the_denoiser_alone():
    weight = torch.eye(8)
    seen = []

    def denoiser(x_t, t, conditions):
        return x_t @ weight

    def guidance(prediction):
        again = prediction.denoise(prediction.x_t, None)
        seen.append((prediction.output.dtype, again.dtype, (again.float() @ weight).dtype))
        return prediction

    noise = initial_noise(0, range(2), (1, 8, 8))
    sample(denoiser, DDIMScheduler(), noise, 2, guidance)
    with torch.autocast("cpu", torch.bfloat16):
        sample(denoiser, DDIMScheduler(), noise, 2, guidance)
    full, half = torch.float32, torch.bfloat16
    assert seen == [(full, full, full)] * 2 + [(half, half, full)] * 2
