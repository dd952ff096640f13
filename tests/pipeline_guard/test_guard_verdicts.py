"""Verdicts on what is no finished picture: NaN, infinity, and images before their last step."""

import math

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from guard_parts import NEVER, PROMPTS, ActiveRows, amg, drawn, make_index, options

import memfree
from memfree.guidance.mitigation import Mitigation

OUTPUTS = ["pil", "np", "pt", "latent"]


def spoilt(value, row):
    """An autoencoder that makes one image of a batch not finite, as in half precision."""
    vae = tiny_pipelines.autoencoder()
    decode = vae.decode

    def spoiling(latents, *args, **kwargs):
        image = decode(latents, *args, **{**kwargs, "return_dict": False})[0].clone()
        if len(image) == 2:
            image[row, 1, 3, 5] = value
        return (image,)

    vae.decode = spoiling
    return vae


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output_type", OUTPUTS[:3])
def test_an_image_that_is_not_finite_has_no_verdict(index, value, output_type):
    pipe = tiny_pipelines.stable_diffusion(vae=spoilt(value, 1))
    with (
        np.errstate(invalid="ignore"),
        memfree.guard(pipe, index, [], on_copy="refuse") as report,
    ):
        drawn(pipe, output_type=output_type)
    fine, broken = report.verdicts
    assert fine.finite and fine.nearest and math.isfinite(fine.similarity)
    assert not broken.finite and not broken.copy and not broken.nearest
    assert math.isnan(broken.similarity) and math.isnan(broken.p_value)
    text = " ".join(str(report).split())
    assert "not finite, no verdict" in text and "1 of 2 images are not finite" in text
    assert report.table()["finite"].to_pylist() == [True, False]


@pytest.mark.parametrize("output_type", OUTPUTS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_a_denoiser_that_overflows_is_said(index, name, output_type, guided):
    pipe = getattr(tiny_pipelines, name)()
    part = pipe.unet.conv_out if hasattr(pipe, "unet") else pipe.transformer.proj_out
    part.bias[0] = math.nan
    guidance = amg(index) if guided else []
    call = {**options(name), "output_type": output_type}
    with np.errstate(invalid="ignore"), memfree.guard(pipe, index, guidance) as report:
        pipe(PROMPTS, **call)
    assert [one.finite for one in report.verdicts] == [False, False] and not report.copies


def test_one_broken_sample_does_not_end_the_call_of_the_others(index):
    pipe = tiny_pipelines.stable_diffusion()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = []
    for value in (0.0, math.nan):
        latents = start.clone()
        latents[1, 0, 0, 0] = value
        with memfree.guard(pipe, index, amg(index)) as report:
            images.append(drawn(pipe, latents=latents))
    assert torch.equal(images[0][0], images[1][0])
    assert [one.finite for one in report.verdicts] == [True, False]


def refiner(base):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_and_refiner(kind=tiny_pipelines.noise_schedule):
    base = tiny_pipelines.stable_diffusion_xl(kind(diffusers.DDIMScheduler))
    return base, refiner(base)


def halves(base, refine, count=2, **extra):
    """Latents after 60 % of the schedule, and the images that a refiner finishes."""
    call = {**options("", count), "num_inference_steps": 5, **extra}
    del call["output_type"]
    prompts = ["a cat"] * count
    latents = base(prompts, denoising_end=0.6, output_type="latent", **call).images
    return latents, refine(
        prompts, image=latents, denoising_start=0.6, output_type="pt", **call
    ).images


def test_a_pipeline_that_ends_early_is_judged_by_its_clean_estimate(index):
    base, _ = base_and_refiner()
    call = {**options("stable_diffusion_xl"), "num_inference_steps": 5}
    estimates, step = [], base.scheduler.step

    def watched(output, t, sample, **kwargs):
        a = base.scheduler.alphas_cumprod[t]
        estimates.append((sample - (1 - a).sqrt() * output) / a.sqrt())
        return step(output, t, sample, **kwargs)

    base.scheduler.step = watched
    with memfree.guard(base, index, []) as report:
        base(PROMPTS, denoising_end=0.6, **{**call, "output_type": "latent"})
    del base.scheduler.step
    assert len(estimates) == 3 and [one.finished for one in report.verdicts] == [False, False]
    decoded = base.vae.decode(estimates[-1] / base.vae.config.scaling_factor).sample.clamp(-1, 1)
    match = memfree.guidance.NormalizedL2()(index, decoded)
    assert [one.nearest for one in report.verdicts] == [
        index.keys[row] for row in match.rows[:, 0].tolist()
    ]
    for one, sigma in zip(report.verdicts, match.sigma.tolist(), strict=True):
        assert one.similarity == pytest.approx(sigma, abs=1e-5)
    assert "2 of 2 images are not finished" in " ".join(str(report).split())


def test_base_and_refiner_keep_bits_and_remove_20_of_20_copies(index):
    base, refine = base_and_refiner()
    expected = halves(base, refine, 20)
    with (
        memfree.guard(base, index, amg(index, NEVER)),
        memfree.guard(refine, index, amg(index, NEVER)) as report,
    ):
        assert all(map(torch.equal, halves(base, refine, 20), expected))
    assert all(one.finished for one in report.verdicts)
    copied = make_index(2 * expected[1] - 1)
    copied.calibrations["nl2-k50-a0.5"]["sigmas"] = [-0.05] * 500
    for guidance, left in (([], 20), (None, 0)):
        with (
            memfree.guard(base, copied, guidance),
            memfree.guard(refine, copied, guidance) as report,
        ):
            halves(base, refine, 20)
        assert len(report.copies) == left


def test_an_interrupted_call_is_not_finished(index):
    pipe = tiny_pipelines.stable_diffusion()

    def stop(pipe, step, t, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    for guidance in ([], ActiveRows([0])):
        with memfree.guard(pipe, index, guidance) as report:
            drawn(pipe, callback_on_step_end=stop)
            drawn(pipe)
        assert [one.finished for one in report.verdicts] == [False, False, True, True]


def test_an_interrupted_call_says_what_is_not_finite(index):
    """Guidances were given numbers in its place."""
    pipe = tiny_pipelines.stable_diffusion()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start[1, 0, 0, 0] = math.nan

    def stop(pipe, step, t, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    call = {"latents": start, "callback_on_step_end": stop}
    for output_type in ("pil", "pt"):
        with np.errstate(invalid="ignore"), memfree.guard(pipe, index, amg(index)) as report:
            drawn(pipe, output_type=output_type, **call)
        assert [(one.finished, one.finite) for one in report.verdicts] == [
            (False, True),
            (False, False),
        ]


@pytest.mark.parametrize("output_type", OUTPUTS)
def test_rejection_returns_what_is_not_finite_as_it_is(index, output_type):
    pipe, asked = tiny_pipelines.stable_diffusion(), []
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start[1, 0, 0, 0] = math.nan

    class Rejects(Mitigation):
        def accept(self, images):
            assert images.isfinite().all()
            asked.append(len(images))
            return torch.tensor([True, False])

    with np.errstate(invalid="ignore"), memfree.guard(pipe, index, [], Rejects()) as report:
        drawn(pipe, output_type=output_type, latents=start)
    assert asked == [2]
    assert [(one.finite, one.draws) for one in report.verdicts] == [(True, 1), (False, 1)]
