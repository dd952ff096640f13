"""Wen's and SAIL's optimisations against a float64 AdamW and Adam written out, and on a U-Net."""

import numpy as np
import pytest
import torch
from tiny_text_model import rows_of, start_of, tiny_unet

from memfree.conditions import TextConditions
from memfree.guidance.baselines import (
    PromptEmbeddingOptimization,
    PromptEmbeddingOptions,
    SharpnessAwareInitialization,
    SharpnessAwareOptions,
    wen_norm,
)
from memfree.guidance.baselines.wen_norm import size_factor

D, L, W = 6, 7, 3
MIX = torch.randn(D, L * W, generator=torch.Generator().manual_seed(2)) / 2


def analytic(x, conditions):
    """ε = x/2 + tanh(B·y): the difference of two prompts does not depend on x."""
    pulled = torch.tanh(conditions.embeddings.flatten(1) @ MIX.T)
    return 0.5 * x + pulled.reshape(x.shape)


def adam(x, gradient, first, second, step, rate, decay=0.0, betas=(0.9, 0.999)):
    """One step of Adam(W) (Kingma and Ba; Loshchilov and Hutter), in float64."""
    x = x * (1 - rate * decay)
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    mean, square = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    return x - rate * mean / (np.sqrt(square) + 1e-8), first, second


def wen_in_numpy(start, target, rate, iterations):
    """Each sample by itself, in float64; the gradient by hand."""
    mix = MIX.double().numpy()
    found = []
    for y, empty in zip(
        start.conditions.embeddings.double().numpy(),
        start.unconditional.embeddings.double().numpy(),
        strict=True,
    ):
        first, second = np.zeros_like(y), np.zeros_like(y)
        for step in range(1, iterations + 1):
            pulled = np.tanh(mix @ y.ravel())
            difference = pulled - np.tanh(mix @ empty.ravel())
            norm = np.sqrt((difference**2).sum())
            if norm <= target:
                break
            gradient = (mix.T @ ((1 - pulled**2) * difference / norm)).reshape(y.shape)
            gradient[0] = 0
            y, first, second = adam(y, gradient, first, second, step, rate, decay=0.01)
        found.append(y)
    return np.stack(found)


def analytic_start(kind="epsilon", alpha_bar=0.01):
    return start_of(analytic, shape=(1, 2, 3), width=W, kind=kind, alpha_bar=alpha_bar)


@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("iterations", [3, 10])
def test_wen_equals_adamw_by_hand_in_every_sample(rate, iterations):
    start = analytic_start()
    norms = wen_norm(start)
    target = float(norms.sort().values[1]) - 0.15  # some stop early, some never
    options = PromptEmbeddingOptions(target, rate, iterations, per_element=False)
    new = PromptEmbeddingOptimization(options).embedding(start).embeddings
    expected = wen_in_numpy(start, target, rate, iterations)
    assert np.abs(new.double().numpy() - expected).max() < 1e-4
    after = wen_norm(start_of_embeddings(start, new))
    assert bool((after[norms > target] < norms[norms > target]).all())


def start_of_embeddings(start, embeddings):
    return type(start)(**{**vars(start), "conditions": TextConditions(embeddings)})


def test_wen_leaves_what_is_below_the_target():
    start = analytic_start()
    norms = wen_norm(start)
    target = float(norms.sort().values[1])
    options = PromptEmbeddingOptions(target, per_element=False)
    new = PromptEmbeddingOptimization(options).embedding(start).embeddings
    below = norms <= target
    assert below.sum() == 2
    assert torch.equal(new[below], start.conditions.embeddings[below])
    assert not torch.equal(new[~below], start.conditions.embeddings[~below])
    everything = PromptEmbeddingOptimization(PromptEmbeddingOptions(1e9)).embedding(start)
    assert torch.equal(everything.embeddings, start.conditions.embeddings)


def test_thresholds_scale_with_the_root_of_the_elements():
    assert size_factor((4, 64, 64), True) == 1 == size_factor((4, 8, 8), False)
    assert size_factor((4, 8, 8), True) == 1 / 8
    start = analytic_start()
    scaled = PromptEmbeddingOptions(3.0)
    plain = PromptEmbeddingOptions(3.0 * (6 / 16384) ** 0.5, per_element=False)
    outcomes = [PromptEmbeddingOptimization(one).embedding(start) for one in (scaled, plain)]
    assert torch.equal(outcomes[0].embeddings, outcomes[1].embeddings)


def test_v_prediction_is_measured_as_epsilon():
    start = analytic_start("v_prediction", alpha_bar=0.25)
    assert torch.allclose(wen_norm(start), wen_norm(analytic_start()) / 2)
    options = PromptEmbeddingOptions(0.2, per_element=False)
    new = PromptEmbeddingOptimization(options).embedding(start).embeddings
    same = PromptEmbeddingOptions(0.4, per_element=False)
    expected = PromptEmbeddingOptimization(same).embedding(analytic_start()).embeddings
    assert torch.allclose(new, expected, atol=1e-5)


MATRIX = torch.randn(D, D, generator=torch.Generator().manual_seed(4)) / 2
SHIFT = torch.randn(D, generator=torch.Generator().manual_seed(5))


def linear(x, conditions):
    """ε = 0.3·x + w·(M·x + g), w being an embedding's first entry: Δ(x) = M·x + g for w 1 and 0."""
    weight = conditions.embeddings[:, 0, 0]
    moved = x.flatten(1) @ MATRIX.T + SHIFT
    return 0.3 * x + (weight[:, None] * moved).reshape(x.shape)


def linear_start(count=4):
    start = start_of(linear, count, shape=(1, 2, 3), width=W)
    start.conditions.embeddings[:, 0, 0] = 1
    start.unconditional.embeddings[:, 0, 0] = 0
    return start


def sail_in_numpy(candidates, threshold, options):
    """One sample's candidates (n, D) in float64: the loss's gradient by hand."""
    m, g = MATRIX.double().numpy(), SHIFT.double().numpy()
    x = candidates.copy()
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, options.iterations + 1):
        losses, gradients = [], []
        for one in x:
            delta = m @ one + g
            length = np.linalg.norm(delta)
            unit = delta / length
            moved = m @ (one + unit) + g
            losses.append(np.linalg.norm(moved) + options.gaussianity * np.linalg.norm(one))
            jacobian = (np.eye(D) - np.outer(unit, unit)) / length
            gradient = (m + m @ jacobian @ m).T @ (moved / np.linalg.norm(moved))
            gradients.append(gradient + options.gaussianity * one / np.linalg.norm(one))
        below = [i for i, loss in enumerate(losses) if loss <= threshold]
        if below or step == options.iterations:
            return x[below[0] if below else int(np.argmin(losses))]
        x, first, second = adam(x, np.stack(gradients), first, second, step, options.learning_rate)


@pytest.mark.parametrize("threshold", [0.5, 1.2, 1.6])
@pytest.mark.parametrize("candidates", [1, 5])
def test_sail_equals_adam_by_hand(threshold, candidates):
    options = SharpnessAwareOptions(
        threshold, learning_rate=0.1, candidates=candidates, per_element=False
    )
    start = linear_start()
    new = SharpnessAwareInitialization(options).initial_noise(start)
    for row, generator in enumerate(linear_start().generators):
        drawn = [start.noise[row].flatten()]
        drawn += [
            torch.randn(1, 2, 3, generator=generator).flatten() for _ in range(candidates - 1)
        ]
        expected = sail_in_numpy(torch.stack(drawn).double().numpy(), threshold, options)
        assert np.abs(new[row].flatten().double().numpy() - expected).max() < 1e-4


def test_sail_leaves_noise_that_is_good_enough():
    start = linear_start()
    options = SharpnessAwareOptions(threshold=1e9)
    new = SharpnessAwareInitialization(options).initial_noise(start)
    assert torch.equal(new, start.noise)


@pytest.mark.parametrize("inference", [False, True])
def test_samples_of_a_unet_are_independent_and_repeatable(inference):
    # In float64: Adam divides by the gradient's size, so that float32's rounding, which depends on
    # the batch size, would grow.
    network = tiny_unet().double()
    frozen = [one.clone() for one in network.parameters()]

    def denoise(x, conditions):
        output = network(x.double(), torch.tensor(900), conditions.embeddings.double())
        return output.sample.float()

    with torch.inference_mode(inference):
        start = start_of(denoise)
        wen = PromptEmbeddingOptimization(
            PromptEmbeddingOptions(float(wen_norm(start).median()) / 2, per_element=False)
        )
        sail = SharpnessAwareInitialization(
            SharpnessAwareOptions(threshold=0.1, iterations=2, candidates=2)
        )
        embeddings = wen.embedding(start).embeddings
        noise = sail.initial_noise(start)
    assert not torch.equal(embeddings, start.conditions.embeddings)
    assert not torch.equal(noise, start.noise)
    for row in range(4):
        one = rows_of(start, slice(row, row + 1))
        assert torch.allclose(wen.embedding(one).embeddings, embeddings[row : row + 1], atol=1e-4)
        assert torch.equal(sail.initial_noise(one), noise[row : row + 1])
    again = rows_of(start, slice(None))
    assert torch.equal(wen.embedding(again).embeddings, embeddings)
    assert torch.equal(sail.initial_noise(again), noise)
    assert all(torch.equal(a, b) for a, b in zip(frozen, network.parameters(), strict=True))
    assert all(one.grad is None for one in network.parameters())
