"""Text-to-image in the sampling module: equal to the plain pipeline, whatever the batch."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from tiny_text import CAPTIONS, tiny_pipeline, tiny_xl

from memfree.guidance import GuidanceSettings, calibrate, default_similarity
from memfree.models import load_model
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.latents import LatentFeatures
from memfree.sampling import SamplingModule
from memfree.sampling.noise import draw, generators

STEPS = 4


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_xl])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    request.param().save_pretrained(folder)
    return load_model(folder)


def scheduler_of(model):
    return DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def module_of(model, settings=(), index=None, latents=None):
    module = SamplingModule(
        model, scheduler_of(model), STEPS, 5, settings, 3.0, CAPTIONS, index, latents
    )
    module.on_predict_start()
    return module


def drawn(module, count, batch_size):
    return torch.cat([module.predict_step(i).images for i in torch.arange(count).split(batch_size)])


def test_unguided_samples_are_the_plain_pipelines(model):
    module = module_of(model)
    ours = module.predict_step(torch.arange(3))
    assert ours.conditions == CAPTIONS[:3] and ours.trace is None
    pipe = model.pipe
    pipe.scheduler = scheduler_of(model)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        CAPTIONS[:3],
        height=8,
        width=8,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=draw(model.noise_shape, generators(5, range(3))),
        output_type="pt",
    ).images
    assert torch.allclose((ours.images / 2 + 0.5).clamp(0, 1), theirs, atol=1e-4)


@pytest.mark.parametrize("mitigation", ["none", "amg", "both", "reject", "rt", "gni", "jain"])
def test_batch_size_changes_nothing(model, images, mitigation):
    index = ReferenceIndex.build(images, captions=[CAPTIONS[i % 4] for i in range(60)])
    held_out = torch.rand(500, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    calibrate(index, default_similarity(index), held_out)
    features = LatentFeatures(model.pipe.vae, None)
    counts = torch.ones(60, dtype=torch.int64).index_fill_(0, torch.arange(3), 50)
    captions = [CAPTIONS[i % 4] for i in range(60)]
    latents = ReferenceIndex.build(images, features, captions=captions, counts=counts)
    settings = GuidanceSettings(mitigation=mitigation, budget=2)
    module = module_of(model, settings, index, latents)
    whole = module.predict_step(torch.arange(4))
    assert torch.allclose(whole.images, drawn(module, 4, 1), atol=2e-3)
    assert whole.trace is not None and bool(whole.trace["sigma"].isfinite().all())
    plain = drawn(module_of(model), 4, 4)
    # This model's samples are no copies: nothing is drawn again.
    assert torch.equal(plain, whole.images) == (mitigation in ("none", "reject"))


def test_a_small_decoder_is_for_estimates_and_not_for_the_last_step(model, images):
    index = ReferenceIndex.build(images, groups=range(60))
    held_out = torch.rand(500, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    calibrate(index, default_similarity(index), held_out)
    plain = module_of(model, GuidanceSettings(), index).predict_step(torch.arange(3))
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    small = replace(model, decoder=decoder.eval().requires_grad_(False))
    found = module_of(small, GuidanceSettings(), index).predict_step(torch.arange(3))
    # An observer changes nothing, so that both see the same estimates, through other decoders.
    assert torch.equal(found.images, plain.images)
    step, sigmas = plain.trace["step"], (plain.trace["sigma"], found.trace["sigma"])
    same = sigmas[0] == sigmas[1]
    assert torch.equal(same, step == STEPS - 1)


def test_wens_norm_stands_in_the_trace(model):
    plain = module_of(model).predict_step(torch.arange(2))
    module = module_of(model, GuidanceSettings(wen_norm_steps=1))
    observed = module.predict_step(torch.arange(2))
    assert torch.equal(observed.images, plain.images)
    noise = draw(model.noise_shape, generators(5, range(2)))
    scheduler = scheduler_of(model)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        cond = model.denoiser(noise, t, model.encode(CAPTIONS[:2]))
        uncond = model.denoiser(noise, t, model.encode(["", ""]))
    expected = (cond - uncond).flatten(1).norm(dim=1)
    trace = observed.trace["wen_norm"].reshape(STEPS, 2)
    torch.testing.assert_close(trace, expected.expand(STEPS, 2), rtol=1e-4, atol=0)
