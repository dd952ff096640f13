"""Multiplicity guidance against the closed form in float64, and against a model that obeys it."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from memfree.guidance import MultiplicityGuidance, Prediction
from memfree.guidance.multiplicity import EmpiricalPosterior
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.search import Groups, References
from memfree.sampling import sample
from memfree.sampling.noise import initial_noise


def numpy_mean(x_t, references, weights, alpha_bar):
    """μ_w(x_t) in float64, term by term."""
    squares = ((x_t[:, None] - np.sqrt(alpha_bar) * references[None]) ** 2).sum(axis=2)
    with np.errstate(divide="ignore"):
        logits = -squares / (2 * (1 - alpha_bar)) + np.log(weights)
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True) @ references


def prediction_of(x_t, alpha_bar, kind="epsilon", conditions=None, guidance_scale=1.0):
    zeros = torch.zeros_like(x_t)
    return Prediction(
        x_t=x_t,
        alpha_bar=torch.tensor(alpha_bar),
        time=0.5,
        output=zeros,
        output_cond=None if conditions is None else zeros,
        output_uncond=zeros,
        conditions=conditions,
        guidance_scale=guidance_scale,
        prediction_type=kind,
        denoise=lambda x, y: torch.zeros_like(x),
    )


@pytest.mark.parametrize("timestep", [0, 20, 500])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_float32_equals_float64_at_cifar_size(timestep, kind):
    generator = torch.Generator().manual_seed(timestep)
    alpha_bar = DDPMScheduler().alphas_cumprod[timestep].item()
    # References far from the origin, and as near to each other as the noise is large, so that
    # several of them share the posterior: there the expanded square fails in float32.
    base = 0.7 * torch.rand(3, 32, 32, generator=generator) + 0.1
    spread = (4 * (1 - alpha_bar) / alpha_bar / 3072) ** 0.5
    images = (base + spread * torch.randn(300, 3, 32, 32, generator=generator)).clamp(-1, 1)
    counts = torch.ones(300, dtype=torch.int64)
    counts[:20] = 64
    index = ReferenceIndex.build(images, counts=counts, groups=[str(i) for i in range(300)])
    assert index.group.unique().numel() == 300
    noise = torch.randn(8, 3, 32, 32, generator=generator)
    source = images[torch.arange(8) * 5]
    x_t = alpha_bar**0.5 * source + (1 - alpha_bar) ** 0.5 * noise
    guided = MultiplicityGuidance(index)(prediction_of(x_t, alpha_bar, kind))
    x_0 = guided.clean_estimate().flatten(1).double().numpy()
    plain = prediction_of(x_t, alpha_bar, kind).clean_estimate().flatten(1).double().numpy()
    flat = index.vectors.double().numpy()
    args = (x_t.flatten(1).double().numpy(), flat)
    expected = numpy_mean(*args, np.ones(300), np.float64(np.float32(alpha_bar))) - numpy_mean(
        *args, index.multiplicity.numpy(), np.float64(np.float32(alpha_bar))
    )
    scale = np.abs(expected).max()
    assert scale > 0.1 * spread
    error = np.abs((x_0 - plain) - expected).max()
    assert error < 0.01 * scale, (error, scale)


def test_spread_references_with_near_neighbours_at_almost_no_noise():
    """Large centred norms: the logits are millions, and what decides between two of them is 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 3, 32, 32, generator=generator) * 1.8 - 0.9
    alpha_bar = DDPMScheduler().alphas_cumprod[0].item()
    spread = (4 * (1 - alpha_bar) / alpha_bar / 3072) ** 0.5
    for i in range(8):  # each has a neighbour as near as the noise is large
        images[100 + i] = images[i] + spread * torch.randn(3, 32, 32, generator=generator)
    counts = torch.ones(200, dtype=torch.int64)
    counts[:8] = 64
    index = ReferenceIndex.build(images, counts=counts, groups=[str(i) for i in range(200)])
    noise = torch.randn(8, 3, 32, 32, generator=generator)
    x_t = alpha_bar**0.5 * images[100:108] + (1 - alpha_bar) ** 0.5 * noise
    guided = MultiplicityGuidance(index)(prediction_of(x_t, alpha_bar))
    moved = -guided.output.flatten(1).double() * ((1 - alpha_bar) / alpha_bar) ** 0.5
    exact = np.float64(np.float32(alpha_bar))
    args = (x_t.flatten(1).double().numpy(), index.vectors.double().numpy())
    expected = numpy_mean(*args, np.ones(200), exact) - numpy_mean(*args, counts.numpy(), exact)
    scale = np.abs(expected).max()
    assert scale > 1e-5
    assert np.abs(moved.numpy() - expected).max() < 0.03 * scale


@pytest.mark.parametrize("timestep", [0, 20, 500])
def test_float32_of_a_class_whose_images_are_not_the_nearest(timestep):
    """Forty images of another class lie nearer than the two that the label leaves."""
    generator = torch.Generator().manual_seed(3)
    alpha_bar = np.float32(DDPMScheduler().alphas_cumprod[timestep].item())
    spread = float((4 * (1 - alpha_bar) / alpha_bar / 3072) ** 0.5)
    base = 0.7 * torch.rand(3, 32, 32, generator=generator) + 0.1

    def around(count, distance):
        return base + distance * torch.randn(count, 3, 32, 32, generator=generator)

    images = torch.cat([around(40, 0.1 * spread), around(2, spread), around(20, 1.0)]).clamp(-1, 1)
    labels = torch.tensor([0] * 40 + [1] * 2 + [0] * 20)
    counts = torch.ones(62, dtype=torch.int64)
    counts[40] = 4
    index = ReferenceIndex.build(
        images, labels=labels, counts=counts, groups=[str(i) for i in range(62)]
    )
    noise = torch.randn(4, 3, 32, 32, generator=generator)
    x_t = float(alpha_bar) ** 0.5 * base + (1 - float(alpha_bar)) ** 0.5 * noise
    y = torch.ones(4, dtype=torch.int64)
    plain = prediction_of(x_t, alpha_bar, conditions=y, guidance_scale=2.0)
    moved = MultiplicityGuidance(index)(plain).output_cond.flatten(1).double().numpy()
    args = (x_t.flatten(1).double().numpy(), index.vectors.double().numpy())
    inside = (labels == 1).numpy()
    wide = np.float64(alpha_bar)
    expected = -np.sqrt(wide / (1 - wide)) * (
        numpy_mean(*args, inside * 1.0, wide) - numpy_mean(*args, inside * counts.numpy(), wide)
    )
    assert np.abs(moved - expected).max() < 0.01 * np.abs(expected).max()


def test_further_denoiser_calls_are_corrected_as_the_branches_are():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator) * 2 - 1
    counts = torch.ones(20, dtype=torch.int64)
    counts[:2] = 50
    index = ReferenceIndex.build(images, labels=torch.arange(20) % 2, counts=counts)
    x_t, y = torch.randn(4, 1, 4, 4, generator=generator), torch.tensor([0, 1, 0, 1])
    guided = MultiplicityGuidance(index)(prediction_of(x_t, 0.2, conditions=y, guidance_scale=2.0))
    assert torch.equal(guided.denoise(x_t, y), guided.output_cond)
    assert torch.equal(guided.denoise(x_t, None), guided.output_uncond)


def test_the_traces_norm_is_of_eps_in_every_parameterisation():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator) * 2 - 1
    counts = torch.ones(20, dtype=torch.int64)
    counts[0] = 50
    guidance = MultiplicityGuidance(ReferenceIndex.build(images, counts=counts))
    x_t = torch.randn(4, 1, 4, 4, generator=generator)
    of_eps = guidance(prediction_of(x_t, 0.3))
    expected = of_eps.output.flatten(1).norm(dim=1)  # the prediction was 0
    assert (expected > 0).all()
    for guided in (of_eps, guidance(prediction_of(x_t, 0.3, "v_prediction"))):
        torch.testing.assert_close(guided.trace["g_mul_norm"], expected, rtol=1e-4, atol=1e-6)


def test_half_precision_outside_does_not_reach_it():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator) * 2 - 1
    counts = torch.ones(20, dtype=torch.int64)
    counts[:2] = 50
    guidance = MultiplicityGuidance(ReferenceIndex.build(images, counts=counts))
    plain = prediction_of(torch.randn(4, 1, 4, 4, generator=generator), 0.2)
    expected = guidance(plain).output
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guidance(plain).output, expected)


def test_near_duplicates_share_one_record():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 4, 4, generator=generator) * 2 - 1
    counts = torch.ones(12, dtype=torch.int64)
    counts[:3] = torch.tensor([5, 3, 2])
    groups = ["a", "a", "a"] + [str(i) for i in range(9)]
    index = ReferenceIndex.build(images, counts=counts, groups=groups)
    x_t = torch.randn(5, 1, 4, 4, generator=generator)
    guided = MultiplicityGuidance(index, strength=1.5)(prediction_of(x_t, 0.3))
    moved = guided.clean_estimate() - prediction_of(x_t, 0.3).clean_estimate()
    share = counts.double().numpy().copy()
    share[:3] /= 10
    args = (x_t.flatten(1).double().numpy(), images.flatten(1).double().numpy())
    expected = numpy_mean(*args, share, 0.3) - numpy_mean(*args, counts.numpy(), 0.3)
    np.testing.assert_allclose(moved.flatten(1), 1.5 * expected, atol=2e-5)


def test_each_branch_has_its_own_references():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator) * 2 - 1
    labels = torch.arange(20) % 2
    counts = torch.ones(20, dtype=torch.int64)
    counts[0] = 50
    index = ReferenceIndex.build(images, labels=labels, counts=counts)
    x_t = torch.randn(4, 1, 4, 4, generator=generator)
    y = torch.tensor([0, 1, 0, 1])
    plain = prediction_of(x_t, 0.2, conditions=y, guidance_scale=3.0)
    guided = MultiplicityGuidance(index)(plain)
    args = (x_t.flatten(1).double().numpy(), images.flatten(1).double().numpy())
    ones, m = np.ones(20), counts.numpy()
    factor = -np.sqrt(0.2 / 0.8)
    expected_uncond = factor * (numpy_mean(*args, ones, 0.2) - numpy_mean(*args, m, 0.2))
    np.testing.assert_allclose(guided.output_uncond.flatten(1), expected_uncond, atol=2e-5)
    for row, label in enumerate(y.tolist()):
        inside = (labels == label).numpy()
        one = [args[0][row : row + 1], args[1]]
        delta = numpy_mean(*one, inside * 1.0, 0.2) - numpy_mean(*one, inside * m, 0.2)
        np.testing.assert_allclose(guided.output_cond[row].flatten(), factor * delta[0], atol=2e-5)
    assert guided.output_cond[1].abs().max() == 0  # no image of class 1 is duplicated
    combined = guided.output_uncond + 3 * (guided.output_cond - guided.output_uncond)
    assert torch.equal(guided.output, combined)


def test_without_duplicates_nothing_changes_bit_for_bit():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = prediction_of(torch.randn(4, 1, 4, 4), 0.5)
    guided = MultiplicityGuidance(ReferenceIndex.build(images))(plain)
    assert torch.equal(guided.output, plain.output)
    counts = torch.ones(20, dtype=torch.int64)
    counts[0] = 9
    off = MultiplicityGuidance(ReferenceIndex.build(images, counts=counts), strength=0.0)(plain)
    assert torch.equal(off.output, plain.output)


def test_unknown_labels_and_embeddings_are_refused():
    images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts = torch.ones(60, dtype=torch.int64)
    counts[0] = 9
    index = ReferenceIndex.build(images, labels=torch.arange(60) % 3, counts=counts)
    x_t = torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="label 7 does not occur"):
        MultiplicityGuidance(index)(prediction_of(x_t, 0.5, conditions=torch.tensor([0, 7])))
    unlabelled = ReferenceIndex.build(images, counts=counts)
    with pytest.raises(ValueError, match="needs an index with labels"):
        MultiplicityGuidance(unlabelled)(prediction_of(x_t, 0.5, conditions=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="strength"):
        MultiplicityGuidance(index, strength=-1.0)


def test_it_turns_a_duplicated_posterior_into_the_deduplicated_one():
    """The optimal denoiser of the duplicated set, guided, samples as that of the unique set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 4, 4, generator=generator) * 2 - 1
    counts = torch.ones(40, dtype=torch.int64)
    counts[:4] = 64
    index = ReferenceIndex.build(images, counts=counts)
    scheduler = DDIMScheduler(clip_sample=False)

    def optimal(weights):
        posterior = EmpiricalPosterior(index.references)

        def denoiser(x_t, t, conditions):
            alpha_bar = scheduler.alphas_cumprod[t]
            shifted, log_weights = posterior.shifted(x_t.flatten(1), alpha_bar), weights.log()
            square = posterior.expanded_square(shifted, alpha_bar)
            logits = posterior.refined(square, shifted, alpha_bar, log_weights) + log_weights
            x_0 = (torch.softmax(logits, dim=1) @ images.flatten(1)).reshape(x_t.shape)
            return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

        return denoiser

    noise = initial_noise(0, range(400), (1, 4, 4))
    plain = sample(optimal(counts.float()), scheduler, noise, 30).images
    guided = sample(
        optimal(counts.float()), scheduler, noise, 30, guidance=MultiplicityGuidance(index)
    ).images
    oracle = sample(optimal(torch.ones(40)), scheduler, noise, 30).images
    torch.testing.assert_close(guided, oracle, atol=5e-3, rtol=0)

    def share(samples):
        return (index.search(samples, 1).rows[:, 0] < 4).float().mean().item()

    assert share(plain) > 0.7
    assert share(guided) == pytest.approx(share(oracle), abs=0.01)


@pytest.mark.parametrize("used", [0, 1, 3, 40])
def test_references_without_weight_are_left_out_of_the_mean(used):
    """Gathered or not, the sum is that of float64."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 6, generator=generator)
    weights = torch.zeros(3, 40)
    weights[:, :used] = torch.randn(3, used, generator=generator)
    expected = weights.numpy().astype(np.float64) @ vectors.numpy().astype(np.float64)
    for keep_centred in (True, False):
        references = References(vectors, Groups.of(torch.arange(40)), "cosine", keep_centred)
        got = EmpiricalPosterior(references).weighted_sum(weights).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_weights_below_rounding_are_zero_and_change_nothing(monkeypatch):
    """A CPU multiplies denormal numbers many times slower."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.rand(600, 6, generator=generator) * 2 - 1
    exponents = -45 * torch.rand(8, 600, generator=generator)
    weights = torch.randn(8, 600, generator=generator).sign() * 10**exponents / 600
    assert ((weights != 0) & (weights.abs() < torch.finfo(torch.float32).tiny)).any()
    seen, plain = [], References.weighted_sum
    monkeypatch.setattr(
        References, "weighted_sum", lambda self, w: seen.append(w) or plain(self, w)
    )
    references = References(vectors, Groups.of(torch.arange(600)), "cosine")
    got = EmpiricalPosterior(references).weighted_sum(weights)
    (used,) = seen
    assert used[used != 0].abs().min() > 2.0**-24 / 601
    expected = weights.double() @ vectors.double()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2.0**-23)
