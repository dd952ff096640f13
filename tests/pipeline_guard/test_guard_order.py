"""Several guidances in a guarded pipeline: the record passes down the list, nothing is lost."""

import pytest
import tiny_pipelines
import torch
from guard_parts import FAMILIES, NEVER, PROMPTS, ActiveRows, amg, noise, options

import memfree
from memfree.guidance import MultiplicityGuidance
from memfree.guidance.baselines import OppositeGuidance, OppositeGuidanceOptions
from memfree.guidance.multiplicity import EmpiricalPosterior
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.search import Groups, References


def latents_of(pipe):
    """References of multiplicity guidance; 5 of 60 are repeated."""
    channels = pipe.vae.config.latent_channels
    counts = torch.ones(60, dtype=torch.int64)
    counts[:5] = 50
    latents = torch.rand(60, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ReferenceIndex.build(latents, captions=PROMPTS * 30, counts=counts, groups=range(60))


def drawn(pipe, name="stable_diffusion", **extra):
    return pipe(PROMPTS, **{"guidance_scale": 4.0, **options(name), **extra}).images


class SameBranches:
    """Gives the branches as they are, as tensors of their own."""

    def __call__(self, prediction):
        uncond = prediction.output_uncond
        return prediction.with_branches(
            prediction.output_cond.clone(), None if uncond is None else uncond.clone()
        )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_branches_that_stay_keep_the_bits_of_every_family(index, name, scale):
    pipe = getattr(tiny_pipelines, name)()
    expected = drawn(pipe, name, guidance_scale=scale)
    with memfree.guard(pipe, index, [SameBranches(), amg(index, NEVER)]):
        assert torch.equal(drawn(pipe, name, guidance_scale=scale), expected)
    first = ActiveRows([1])
    with memfree.guard(pipe, index, [first, SameBranches()]):
        after = drawn(pipe, name, guidance_scale=scale)
    with memfree.guard(pipe, index, ActiveRows([1])):
        assert torch.equal(drawn(pipe, name, guidance_scale=scale), after)
    assert not torch.equal(after, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_multiplicity_guidance_far_from_what_is_repeated_keeps_the_pipelines_bits(index, name):
    pipe = getattr(tiny_pipelines, name)()
    references = latents_of(pipe)
    multiplicity = MultiplicityGuidance(references)
    far = references.vectors.clone()
    far[:5] += 1000
    multiplicity.posterior = EmpiricalPosterior(References(far, Groups.of(references.group), "l2"))
    ran = []

    def later(prediction):
        """Not at the pure noise of flow matching's first step, where nothing is far."""
        if prediction.step == 0:
            return prediction
        ran.append(multiplicity(prediction))
        return ran[-1]

    expected = drawn(pipe, name)
    with memfree.guard(pipe, index, later):
        assert torch.equal(drawn(pipe, name), expected)
    assert len(ran) >= 2 and not any(one.trace["g_mul_norm"].any() for one in ran)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_multiplicity_guidance_keeps_what_came_before_it(pipe, index, rescale):
    """Whatever the order, the prediction has moved by the sum of both at the first step."""
    call = {"guidance_rescale": rescale}
    multiplicity = MultiplicityGuidance(latents_of(pipe), 1.0)
    steps = []

    def last(prediction):
        steps.append(prediction)
        return prediction

    def seen(*guidances):
        """The record that a last guidance sees at the first step, and the images."""
        steps.clear()
        with memfree.guard(pipe, index, [*guidances, last]):
            images = drawn(pipe, **call)
        return steps[0].output, images

    plain, _ = seen()
    moved, _ = seen(ActiveRows([1]))
    recombined, alone = seen(multiplicity)
    before, images = seen(ActiveRows([1]), multiplicity)
    assert not torch.equal(images[1], alone[1]) and not torch.equal(recombined, plain)
    assert torch.equal(images[0], alone[0]) and torch.equal(before[0], recombined[0])
    expected = (moved.double() - plain) + (recombined.double() - plain) + plain
    torch.testing.assert_close(before.double(), expected, atol=1e-6, rtol=0)
    # What it recombines itself is the combination of the branches, to the bit.
    first = steps[0]
    assert torch.equal(recombined, first.combined(first.output_cond, first.output_uncond))


def test_a_mitigations_guidance_is_not_lost_before_multiplicity_guidance(pipe, index):
    multiplicity = MultiplicityGuidance(latents_of(pipe), 1.0)
    with memfree.guard(pipe, index, [multiplicity]):
        alone = drawn(pipe)
    with memfree.guard(pipe, index, [multiplicity], mitigation=OppositeGuidance()):
        assert not torch.equal(drawn(pipe), alone)


def test_opposite_guidance_is_rescaled_as_the_pipeline_rescales(pipe, index):
    """At another scale throughout, it is the pipeline called with that scale."""
    opposite = OppositeGuidance(OppositeGuidanceOptions("static", 0.0, 2.0))
    call = {"guidance_rescale": 0.7, "generator": noise()}
    expected = drawn(pipe, guidance_scale=2.0, **call)
    other = drawn(pipe, guidance_scale=2.0)
    call["generator"] = noise()
    with memfree.guard(pipe, index, amg(index, NEVER), mitigation=opposite):
        images = drawn(pipe, guidance_scale=6.0, **call)
    assert (other - expected).abs().max() > 1e-3
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
