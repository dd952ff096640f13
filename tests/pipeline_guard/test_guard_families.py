"""The guard on every family: bits where nothing is active, and what acts where something is."""

import functools

import pytest
import tiny_pipelines
import torch
from guard_parts import (
    FAMILIES,
    NEVER,
    PROMPTS,
    ActiveRows,
    amg,
    make_index,
    noise,
    options,
    state,
)

import memfree
from memfree.guidance import MultiplicityGuidance, NormalizedL2, Observer, ThresholdSchedule


def observer(index):
    return Observer(index, NormalizedL2(), ThresholdSchedule(-1.5, -0.5))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_where_nothing_is_active_images_have_the_pipelines_bits(index, pipes, name, scale):
    pipe = pipes[name]
    expected = pipe(PROMPTS, guidance_scale=scale, **options(name)).images
    never = amg(index, NEVER)
    with memfree.guard(pipe, index, [observer(index), never]) as report:
        images = pipe(PROMPTS, guidance_scale=scale, **options(name)).images
    assert torch.equal(images, expected)
    steps = len(report.trace) // 2
    assert steps >= 3 and not any(report.trace["active"].to_pylist())
    assert report.trace["sample"].to_pylist() == [0, 1] * steps
    assert torch.isfinite(torch.tensor(report.trace["sigma"].to_pylist())).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_guidance_moves_the_clean_estimate_by_what_it_asks_and_only_in_its_rows(
    index, pipes, name, scale
):
    pipe, estimates = pipes[name], []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at what a step takes
    def watched(output, t, sample, **kwargs):
        """x̂_0 by the definition of the noise process, in float64."""
        if "Flow" in type(scheduler).__name__:
            index = scheduler.index_for_timestep(t) if scheduler.step_index is None else None
            sigma = scheduler.sigmas[scheduler.step_index if index is None else index].double()
            estimates.append(sample.double() - sigma * output.double())
        elif hasattr(scheduler, "sigmas"):
            sigma = scheduler.sigmas[scheduler.step_index].double()
            estimates.append(sample.double() - sigma * output.double())
        else:
            a = scheduler.alphas_cumprod[t].double()
            estimates.append((sample.double() - (1 - a).sqrt() * output.double()) / a.sqrt())
        return step(output, t, sample, **kwargs)

    scheduler.step = watched
    try:
        expected = pipe(PROMPTS, guidance_scale=scale, **options(name)).images
        plain, estimates[:] = list(estimates), []
        # From the second step on: the first of flow matching is pure noise, where n = 1.
        with memfree.guard(pipe, index, ActiveRows([1], first_step=1)):
            images = pipe(PROMPTS, guidance_scale=scale, **options(name)).images
    finally:
        del scheduler.step
    assert torch.equal(images[0], expected[0])
    assert not torch.equal(images[1], expected[1])
    # There x_t is still the same, so that the estimate moved by the change alone.
    assert torch.equal(estimates[0], plain[0])
    moved = estimates[1] - plain[1]
    assert torch.equal(moved[0], torch.zeros_like(moved[0]))
    torch.testing.assert_close(moved[1], torch.full_like(moved[1], 0.3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_records_hold_the_noise_process_in_the_terms_of_guidances(index, pipes, name):
    """x̂_0 of the record is the pipeline's, and calls of the denoiser return its branches."""
    pipe, observed = pipes[name], ActiveRows([0], 0.0)
    call = options(name)
    scheduler, step, estimates = pipe.scheduler, pipe.scheduler.step, []

    @functools.wraps(step)
    def watched(output, t, sample, **kwargs):
        if "stable_diffusion_3" in name:
            at = (scheduler.begin_index or 0) + len(estimates)
            estimates.append(sample.double() - scheduler.sigmas[at].double() * output.double())
        elif not hasattr(scheduler, "sigmas"):
            a = scheduler.alphas_cumprod[t].double()
            estimates.append((sample.double() - (1 - a).sqrt() * output.double()) / a.sqrt())
        else:
            sigma = scheduler.sigmas[scheduler.step_index].double()
            estimates.append(sample.double() - sigma * output.double())
        return step(output, t, sample, **kwargs)

    scheduler.step = watched
    try:
        with memfree.guard(pipe, index, observed):
            pipe(PROMPTS, guidance_scale=4.0, **call)
    finally:
        del scheduler.step
    for one, estimate in zip(observed.seen, estimates, strict=True):
        torch.testing.assert_close(one.clean_estimate().double(), estimate, atol=4e-3, rtol=1e-4)
        branches = [(one.conditions, one.output_cond), (None, one.output_uncond)]
        for conditions, branch in branches[:1] if "latent_consistency" in name else branches:
            torch.testing.assert_close(one.denoise(one.x_t, conditions), branch)
            rows = None if conditions is None else conditions[slice(1, 2)]
            torch.testing.assert_close(
                one.denoise(one.x_t[1:], rows), branch[1:], atol=1e-4, rtol=1e-4
            )
        encoded = one.encode(PROMPTS)
        torch.testing.assert_close(encoded.embeddings, one.conditions.embeddings)
        for other, own in (
            (encoded.pooled, one.conditions.pooled),
            (encoded.mask, one.conditions.mask),
        ):
            assert (other is None) == (own is None)
            if own is not None:
                torch.testing.assert_close(other.float(), own.float())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_guidances_of_amg_run_on_every_family(index, pipes, name):
    pipe = pipes[name]
    expected = pipe(PROMPTS, guidance_scale=4.0, **options(name)).images
    with memfree.guard(pipe, index, amg(index)) as report:
        images = pipe(PROMPTS, guidance_scale=4.0, **options(name)).images
    assert not torch.equal(images, expected) and torch.isfinite(images).all()
    trace = report.trace.to_pydict()
    assert all(trace["active"]) and min(trace["g_sim_norm"]) > 0
    if "latent_consistency" not in name:  # these have one branch
        assert max(trace["s1"]) > 0 and max(trace["s2"]) > 0


def test_further_calls_get_the_other_arguments_of_their_own_half(index, pipes):
    pipe, observed = pipes["stable_diffusion_xl"], ActiveRows([0], 0.0)
    sizes = {"negative_original_size": (400, 9), "negative_target_size": (500, 500)}
    with memfree.guard(pipe, index, observed):
        pipe("a cat", guidance_scale=4.0, **sizes, **options("stable_diffusion_xl", 1))
    one = observed.seen[0]
    torch.testing.assert_close(one.denoise(one.x_t, one.conditions), one.output_cond)
    torch.testing.assert_close(one.denoise(one.x_t, None), one.output_uncond)


def test_low_precision_keeps_bits_and_the_corrected_prediction(index):
    pipe = tiny_pipelines.stable_diffusion().to(torch.bfloat16)
    call = options("stable_diffusion")
    outputs, step = [], pipe.scheduler.step

    def watched(output, t, sample, **kwargs):
        outputs.append(output)
        return step(output, t, sample, **kwargs)

    expected = pipe(PROMPTS, **{**call, "generator": noise()}).images
    pipe.scheduler.step = watched
    guidance = ActiveRows([1])
    with memfree.guard(pipe, index, guidance):
        images = pipe(PROMPTS, **{**call, "generator": noise()}).images
    assert torch.equal(images[0], expected[0]) and not torch.equal(images[1], expected[1])
    # The pipeline's combination of two equal halves left the correction as it was written.
    seen = guidance.seen[0]
    corrected = guidance(seen).output
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(outputs[0], corrected)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_guidance_rescale_is_the_pipelines_own(index, pipes, name):
    pipe, outputs = pipes[name], []
    call = {**options(name), "guidance_rescale": 0.7, "guidance_scale": 6.0}
    expected = pipe(PROMPTS, **{**call, "generator": noise()}).images
    with memfree.guard(pipe, index, amg(index, NEVER)):
        assert torch.equal(pipe(PROMPTS, **{**call, "generator": noise()}).images, expected)
    step, plain = pipe.scheduler.step, []
    pipe.scheduler.step = lambda out, *a, **k: (plain.append(out), step(out, *a, **k))[1]
    pipe(PROMPTS, **{**call, "generator": noise()})
    pipe.scheduler.step = lambda out, *a, **k: (outputs.append(out), step(out, *a, **k))[1]
    guidance = ActiveRows([1])
    with memfree.guard(pipe, index, guidance):
        images = pipe(PROMPTS, **{**call, "generator": noise()}).images
    del pipe.scheduler.step
    assert torch.equal(images[0], expected[0])
    seen = guidance.seen[0]
    torch.testing.assert_close(seen.output, plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0][1], guidance(seen).output[1], rtol=1e-5, atol=1e-6)


def test_samples_of_a_batch_have_a_gate_each_and_prompts_have_several_images(index, pipes):
    pipe = pipes["stable_diffusion"]
    call = {**options("", 4), "num_images_per_prompt": 2, "negative_prompt": ["red", "blue"]}
    expected = pipe(PROMPTS, **{**call, "generator": noise(4)}).images
    with memfree.guard(pipe, index, ActiveRows([1, 2])) as report:
        images = pipe(PROMPTS, **{**call, "generator": noise(4)}).images
    same = [torch.equal(a, b) for a, b in zip(images, expected, strict=True)]
    assert same == [True, False, False, True]
    assert [one.image for one in report.verdicts] == [0, 1, 2, 3]


def test_works_inside_inference_mode_and_with_gradients_through_the_denoiser(index, pipes):
    pipe = pipes["stable_diffusion_xl"]

    def made():
        guidance = amg(index, c3=30.0, c2=1.0, gradient="denoiser", final_correction=-1.0)
        with memfree.guard(pipe, index, guidance):
            return pipe(PROMPTS, **options("stable_diffusion_xl")).images

    outside = made()
    with torch.inference_mode():
        inside = made()
    assert torch.equal(outside, inside)


def test_a_smaller_decoder_and_chunks_are_used(index, pipes):
    pipe = pipes["stable_diffusion"]
    call = options("stable_diffusion")

    def made(**extra):
        with memfree.guard(pipe, index, amg(index), **extra) as report:
            images = pipe(PROMPTS, **{**call, "generator": noise()}).images
        return images, torch.tensor(report.trace["sigma"].to_pylist())

    whole, chunked = made(), made(chunk_size=1)
    torch.testing.assert_close(whole[0], chunked[0], atol=1e-4, rtol=0)
    decoder = tiny_pipelines.tiny_autoencoder()
    tiny = made(decoder=decoder)
    assert not torch.allclose(tiny[1], whole[1])
    assert decoder.device == torch.device("cpu")


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_the_last_step_and_the_verdicts_are_of_the_full_autoencoder(index, pipes, output_type):
    pipe, call = pipes["stable_diffusion"], options("stable_diffusion")
    call["output_type"] = output_type

    def judged(**extra):
        with memfree.guard(pipe, index, amg(index, NEVER), **extra) as report:
            pipe(PROMPTS, **{**call, "generator": noise()})
        trace = report.trace.to_pydict()
        last = [s for s, t in zip(trace["sigma"], trace["step"], strict=True) if t == 3]
        first = [s for s, t in zip(trace["sigma"], trace["step"], strict=True) if t < 3]
        return first, last, [one.similarity for one in report.verdicts]

    full, tiny = judged(), judged(decoder=tiny_pipelines.tiny_autoencoder())
    assert full[0] != tiny[0]
    assert full[1:] == tiny[1:]


def test_a_decoder_of_other_latents_is_refused(index, pipes):
    pipe = pipes["stable_diffusion"]
    for decoder, message in (
        (tiny_pipelines.tiny_autoencoder(latent_channels=16), "takes latents of 16 channels"),
        (torch.nn.Linear(1, 1), "is a Linear, not an autoencoder"),
    ):
        before = state(pipe)
        with (
            pytest.raises(ValueError, match=f"memfree.guard: decoder {message}"),
            memfree.guard(pipe, index, decoder=decoder),
        ):
            pass
        assert state(pipe) == before


def test_multiplicity_guidance_changes_both_branches(pipes):
    """Its references are latents in use; here pixels of the latents' shape stand for them."""
    from memfree.guidance import calibrate
    from memfree.retrieval import ReferenceIndex

    generator = torch.Generator().manual_seed(0)
    counts = torch.ones(60, dtype=torch.int64)
    counts[:5] = 50
    latents = torch.rand(60, 4, 8, 8, generator=generator) * 2 - 1
    references = ReferenceIndex.build(
        latents, captions=PROMPTS * 30, counts=counts, groups=range(60)
    )
    calibrate(references, NormalizedL2(), torch.rand(500, 4, 8, 8, generator=generator))
    after = ActiveRows([0], 0.0)
    pipe = pipes["stable_diffusion"]
    call = {**options("stable_diffusion"), "guidance_rescale": 0.5, "guidance_scale": 4.0}
    expected = pipe(PROMPTS, **{**call, "generator": noise()}).images
    with memfree.guard(pipe, make_index(), [MultiplicityGuidance(references, 1.0), after]):
        images = pipe(PROMPTS, **{**call, "generator": noise()}).images
    assert not torch.equal(images, expected) and torch.isfinite(images).all()
    # What comes after it sees the branches recombined, and rescaled as the pipeline does.
    for one in after.seen:
        combined = one.output_uncond + 4 * (one.output_cond - one.output_uncond)
        ratio = one.output_cond.flatten(1).std(1) / combined.flatten(1).std(1)
        combined = combined * (0.5 * ratio + 0.5)[:, None, None, None]
        torch.testing.assert_close(one.output, combined)
