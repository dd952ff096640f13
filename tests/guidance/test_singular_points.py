"""Guidance where its formulas divide by 0: ᾱ of 0 and 1, on top of an image, one group, no rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from amg_steps import make_images, make_index, prediction_near
from diffusers import DDIMScheduler

from memfree.diffusion_math import alpha_bar_at
from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    EmbeddingSimilarity,
    MultiplicityGuidance,
    NormalizedL2,
    Prediction,
    SteadyAMG,
)
from memfree.guidance.multiplicity import EmpiricalPosterior
from memfree.retrieval import ReferenceIndex
from memfree.sampling import sample

ALWAYS = ConstantThreshold(-99.0)


def repeated_index(groups=None):
    counts = torch.ones(80, dtype=torch.int64)
    counts[:8] = 64
    labels = torch.arange(80) % 5
    return ReferenceIndex.build(make_images(), labels=labels, counts=counts, groups=groups)


def guidances(index, k=50):
    amg = SteadyAMG(index, NormalizedL2(k=k), ALWAYS, c1=1.0, c2=0.1, c3=10.0, max_displacement=0.5)
    return {
        "amg": amg,
        "published": AntiMemorizationGuidance(index, NormalizedL2(k=k), ALWAYS, c3=10.0),
        "multiplicity": MultiplicityGuidance(index, 1.5),
        "both": [MultiplicityGuidance(index, 1.5), amg],
    }


def step(alpha_bar, kind, rows=(3, 12, 25)):
    generator = torch.Generator().manual_seed(0)
    x_t, cond, uncond = torch.randn(3, len(rows), 1, 4, 4, generator=generator)
    return Prediction(
        x_t=x_t,
        alpha_bar=torch.tensor(alpha_bar),
        time=0.5,
        output=uncond + 3 * (cond - uncond),
        output_cond=cond,
        output_uncond=uncond,
        conditions=torch.zeros(len(rows), dtype=torch.int64),
        guidance_scale=3.0,
        prediction_type=kind,
        denoise=lambda x, y: 0.3 * x,
    )


@pytest.mark.parametrize("name", ["amg", "published", "multiplicity", "both"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("alpha_bar", [0.0, 1.0])
def test_no_and_full_signal_stay_finite(name, kind, alpha_bar):
    result = step(alpha_bar, kind)
    chosen = guidances(repeated_index())[name]
    for guidance in chosen if isinstance(chosen, list) else [chosen]:
        result = guidance(result)
    assert result.output.isfinite().all() and result.clean_estimate().isfinite().all()
    assert all(column.isfinite().all() for column in result.trace.values())


@pytest.mark.parametrize("name", ["amg", "multiplicity", "both"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_zero_terminal_snr_is_sampled(name, spacing):
    """ᾱ is 0 at the first step (Lin et al., 2023)."""
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing
    )
    scheduler.set_timesteps(6)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    assert 0 < alpha_bar_at(scheduler, scheduler.timesteps[0], 0) < 1e-9
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guidance = guidances(repeated_index())[name]
    result = sample(lambda x, t, y: 0.5 * x, scheduler, noise, 6, guidance=guidance, trace=True)
    assert result.images.isfinite().all() and result.images.abs().max() < 10
    assert all(column[column == column].isfinite().all() for column in result.trace.values())


@pytest.mark.parametrize("alpha_bar", [0.0, 1.0])
def test_the_posterior_at_both_ends(alpha_bar):
    """Without signal the prior decides, without noise the nearest reference alone."""
    index = repeated_index()
    posterior, a = EmpiricalPosterior(index.references), torch.tensor(alpha_bar)
    x_t = index.vectors[[3, 40]]
    shifted = posterior.shifted(x_t, a)
    logits = posterior.expanded_square(shifted, a)
    weights = torch.ones(80).log(), index.multiplicity.float().log()
    got = posterior.mean_difference(logits, shifted, a, *weights)
    m = index.multiplicity.float() / index.multiplicity.sum()
    expected = (1 / 80 - m) @ index.vectors if alpha_bar == 0 else torch.zeros(16)
    torch.testing.assert_close(got, expected.expand(2, -1), atol=1e-4, rtol=1e-3)


def test_schedules_without_a_zero_keep_their_bits():
    for steps in (100, 1000, 4000):
        scheduler = DDIMScheduler(steps, beta_schedule="squaredcos_cap_v2")
        for t in (0, steps - 1):
            assert alpha_bar_at(scheduler, t, 0) == scheduler.alphas_cumprod[t]


@pytest.mark.parametrize("k", [1, 5, 50])
def test_on_top_of_an_image_the_gradient_has_its_length_and_leads_to_its_neighbours(k):
    index, similarity = make_index(make_images()), NormalizedL2(k=k)
    far = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
    images = torch.cat([index.images(torch.tensor([7])), far]).requires_grad_()
    match = similarity(index, images)
    (gradient,) = torch.autograd.grad(match.sigma.sum(), images)
    references = index.vectors[match.rows]
    mean = (images.detach().flatten(1)[:, None] - references).norm(dim=2).mean(1)
    if k > 1:  # with one neighbour the mean is 0, and what stands for it bounds the length
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), 1 / (0.5 * mean))
        towards = (references[0, 1:] - references[0, :1]).sum(0)
        cosine = torch.nn.functional.cosine_similarity(-gradient[0].flatten(), towards, dim=0)
        assert cosine > 0.999
    assert match.sigma[0] == 0 and gradient.isfinite().all() and (gradient[0] != 0).any()
    moved = images.detach() - 0.1 * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert similarity(index, moved).sigma[0] < -1e-3
    # Elsewhere, the gradient of the plain formula, bit for bit.
    plain = far.clone().requires_grad_()
    apart = torch.linalg.vector_norm(plain.flatten(1) - references[1, 0], dim=1)
    sigma = -apart / (
        0.5 * (plain.detach().flatten(1)[:, None] - references[1:]).norm(dim=2).mean(1)
    )
    assert torch.equal(torch.autograd.grad(sigma.sum(), plain)[0], gradient[1:])


def test_on_top_of_an_embedding_the_cosine_has_a_gradient():
    vectors = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
    index = SimpleNamespace(
        vectors=vectors,
        features=lambda images: torch.nn.functional.normalize(images.flatten(1), dim=1),
    )
    images = torch.cat([3 * vectors[:1], torch.randn(1, 16)]).reshape(2, 1, 4, 4).requires_grad_()
    rows = torch.tensor([[0], [1]])
    sigma = EmbeddingSimilarity().against(index, images, rows)
    features = index.features(images)
    plain = (features * vectors[:2]).sum(dim=1)
    assert torch.equal(sigma, plain)
    (gradient,) = torch.autograd.grad(sigma.sum(), images, retain_graph=True)
    (expected,) = torch.autograd.grad(plain.sum(), images)
    assert torch.equal(gradient[1], expected[1])
    assert gradient[0].norm() > 0.1 > expected[0].norm()
    moved = EmbeddingSimilarity().against(index, images.detach() - 0.3 * gradient, rows)
    assert moved[0] < sigma[0] - 1e-4


def test_amg_pushes_a_sample_off_the_very_image():
    index = make_index(make_images())
    plain = step(0.5, "sample")
    plain = replace(plain, output=index.images(torch.tensor([3, 12, 25])))
    guided = AntiMemorizationGuidance(index, NormalizedL2(), ALWAYS, c3=10.0)(plain)
    assert (guided.trace["g_sim_norm"] > 0.1).all()
    assert (NormalizedL2()(index, guided.clean_estimate()).sigma < -0.01).all()


def test_one_group_and_all_neighbours_at_the_sample_stay_finite():
    """Eq. 8 divides by the mean distance, which is 0 here."""
    images = make_images()[:1].repeat(4, 1, 1, 1)
    index = ReferenceIndex.build(images[:1])
    index.vectors = index.vectors.repeat(1, 1)
    x = images[:1].clone().requires_grad_()
    sigma = NormalizedL2(k=1)(index, x).sigma
    (gradient,) = torch.autograd.grad(sigma.sum(), x)
    assert sigma == 0 and gradient.isfinite().all()
    guided = SteadyAMG(index, NormalizedL2(k=1), ALWAYS, c3=1.0, max_displacement=0.5)
    plain = replace(step(0.5, "sample", (0,)), output=images[:1])
    assert guided(plain).output.isfinite().all()
    one_group = repeated_index(groups=[0] * 80)
    result = MultiplicityGuidance(one_group)(step(0.5, "epsilon"))
    torch.testing.assert_close(result.output, step(0.5, "epsilon").output)


@pytest.mark.parametrize("name", ["amg", "multiplicity", "both"])
def test_an_empty_batch_passes(name):
    _, plain = prediction_near(make_images(), [3, 4])
    none = torch.zeros(0, dtype=torch.int64)
    fields = ("x_t", "output", "output_cond", "output_uncond", "conditions")
    result = replace(plain, **{field: getattr(plain, field)[none] for field in fields})
    chosen = guidances(repeated_index())[name]
    for guidance in chosen if isinstance(chosen, list) else [chosen]:
        result = guidance(result)
    assert result.output.shape == (0, 1, 4, 4)
