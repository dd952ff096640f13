"""Every equation of the paper against numpy in float64, written down independently."""

import numpy as np
import pytest
import torch

from memfree import diffusion_math
from memfree.guidance import EmbeddingSimilarity, NormalizedL2, ThresholdSchedule, equations
from memfree.guidance.amg_extensions import limit_displacement
from memfree.retrieval import PixelFeatures, ReferenceIndex


@pytest.fixture
def index():
    generator = torch.Generator().manual_seed(0)
    return ReferenceIndex.build(torch.rand(80, 1, 4, 4, generator=generator) * 2 - 1)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_estimate_eq_12(kind):
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 3, 1, 4, 4))
    a = 0.37
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    v = np.sqrt(a) * eps - np.sqrt(1 - a) * x_0
    output = {"epsilon": eps, "v_prediction": v, "sample": x_0}[kind]
    t = [torch.tensor(value, dtype=torch.float64) for value in (x_t, output, a)]
    np.testing.assert_allclose(diffusion_math.predicted_x_0(*t, kind), x_0, atol=1e-12)
    target = diffusion_math.training_target(torch.tensor(x_0), torch.tensor(eps), t[2], kind)
    np.testing.assert_allclose(target, output, atol=1e-12)
    # A change of ε̂ (or of x̂_0) by d, said in the output's own terms, changes ε̂ (x̂_0) by d.
    d = torch.tensor(rng.normal(size=x_0.shape))
    changed = t[1] + diffusion_math.output_change_from_eps(d, t[2], kind)
    # ε̂ = (x_t − √ᾱ·x̂_0)/√(1−ᾱ), of the changed x̂_0.
    changed_x_0 = diffusion_math.predicted_x_0(t[0], changed, t[2], kind).numpy()
    changed_eps = (x_t - np.sqrt(a) * changed_x_0) / np.sqrt(1 - a)
    np.testing.assert_allclose(changed_eps, eps + d.numpy(), atol=1e-12)
    changed = t[1] + diffusion_math.output_change_from_x_0(d, t[2], kind)
    np.testing.assert_allclose(
        diffusion_math.predicted_x_0(t[0], changed, t[2], kind), x_0 + d.numpy(), atol=1e-12
    )


def numpy_nl2(x, references, k, alpha):
    distances = np.sort(np.sqrt(((x - references) ** 2).sum(axis=1)))
    return -distances[0] / (alpha * distances[:k].mean())


def test_normalized_l2_eq_8(index, images):
    match = NormalizedL2(k=50, alpha=0.5)(index, images)
    references = index.vectors.double().numpy()
    for sigma, image in zip(match.sigma, images.double().flatten(1).numpy(), strict=True):
        assert sigma.item() == pytest.approx(numpy_nl2(image, references, 50, 0.5), rel=1e-6)


@pytest.mark.parametrize("differentiate_mean", [False, True])
def test_gradient_of_nl2_is_that_of_finite_differences(index, images, differentiate_mean):
    similarity = NormalizedL2(k=10, differentiate_mean=differentiate_mean)
    rows = similarity(index, images).rows
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(similarity.against(index, x, rows).sum(), x)
    references = index.vectors.double().numpy()

    def sigma(flat, constant):
        distances = np.sqrt(((flat - references[rows[0].numpy()]) ** 2).sum(axis=1))
        return -distances[0] / (0.5 * (distances.mean() if constant is None else constant))

    flat = images[0].double().flatten().numpy()
    distances = np.sqrt(((flat - references[rows[0].numpy()]) ** 2).sum(axis=1))
    constant = None if differentiate_mean else distances.mean()
    for j in range(flat.size):
        step = np.zeros_like(flat)
        step[j] = 1e-6
        slope = (sigma(flat + step, constant) - sigma(flat - step, constant)) / 2e-6
        assert gradient[0].flatten()[j].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


class UnitPixels(PixelFeatures):
    """Pixels on the unit sphere: an embedding whose cosine numpy can follow."""

    metric = "cosine"

    def forward(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)


def test_embedding_similarity_eq_9(images):
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(30, 1, 4, 4, generator=generator) * 2 - 1
    index = ReferenceIndex.build(references, features=UnitPixels())
    x = images.clone().requires_grad_()
    match = EmbeddingSimilarity()(index, x)
    unit = references.double().flatten(1).numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    flat = images.double().flatten(1).numpy()
    expected = (flat / np.linalg.norm(flat, axis=1, keepdims=True) @ unit.T).max(axis=1)
    np.testing.assert_allclose(match.sigma.detach(), expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(match.sigma.sum(), x)
    assert gradient.abs().sum() > 0


def test_threshold_schedule_eq_19():
    schedule = ThresholdSchedule(start=-1.95, end=-1.5, rate=0.025)
    for timestep in (0, 100, 999):
        t = 250 * timestep / 1000
        expected = -1.95 + (-1.5 + 1.95) * np.exp(-0.025 * t)
        assert schedule(timestep / 1000) == pytest.approx(expected, rel=1e-12)
    assert schedule(0.0) == -1.5
    assert schedule(1.0) == pytest.approx(-1.95, abs=1e-2)


@pytest.mark.parametrize("s_0", [0.5, 1.0, 2.0, 7.5])
def test_scales_eq_13_and_15(s_0):
    strength = torch.tensor([0.0, 0.05, 0.3, 5.0])
    s_1 = equations.despecification_scale(strength, 3.0, s_0)
    s_2 = equations.deduplication_scale(strength, 4.0, s_0, s_1)
    for i, value in enumerate(strength.tolist()):
        first = min(max(3.0 * value, 0.0), max(s_0 - 1, 0.0))
        second = min(max(4.0 * value, 0.0), max(s_0 - first - 1, 0.0))
        assert s_1[i].item() == pytest.approx(first, abs=1e-6)
        assert s_2[i].item() == pytest.approx(second, abs=1e-6)


def test_guidances_eq_14_16_17():
    rng = np.random.default_rng(3)
    cond, uncond, neighbour, gradient = rng.normal(size=(4, 2, 1, 3, 3))
    s = np.array([0.4, 1.2])
    t = torch.tensor
    shaped = s[:, None, None, None]
    np.testing.assert_allclose(
        equations.despecification(t(s), t(cond), t(uncond)), -shaped * (cond - uncond)
    )
    np.testing.assert_allclose(
        equations.deduplication(t(s), t(neighbour), t(uncond)), -shaped * (neighbour - uncond)
    )
    np.testing.assert_allclose(
        equations.dissimilarity(12.0, t(0.3, dtype=torch.float64), t(gradient)),
        12.0 * np.sqrt(1 - 0.3) * gradient,
    )


def test_gate_eq_10_opens_above_the_threshold_only():
    assert equations.gate(torch.tensor([-1.0, -0.7, -0.6]), -0.7).tolist() == [False, False, True]


def test_displacement_limit_is_on_the_clean_estimate():
    g_sim = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.01, 1.0, 10.0, 100.0]
    ).view(4, 1, 1, 1)
    alpha_bar = torch.tensor(0.2)
    limited = limit_displacement(g_sim, alpha_bar, 0.5)
    rms = (limited * np.sqrt(0.8 / 0.2)).flatten(1).square().mean(dim=1).sqrt()
    assert (rms <= 0.5 + 1e-6).all()
    assert torch.equal(limited[0], g_sim[0])
    direction = torch.nn.functional.cosine_similarity(limited.flatten(1), g_sim.flatten(1))
    torch.testing.assert_close(direction, torch.ones(4))
