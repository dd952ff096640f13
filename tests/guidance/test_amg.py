"""AMG as a whole: the paper's formula, who pays, who keeps their bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from amg_steps import ALPHA_BAR, ANY, Network, make_images, make_index, prediction_near

from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    NormalizedL2,
    Observer,
    SteadyAMG,
    ThresholdSchedule,
)


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def index(images):
    return make_index(images)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_whole_formula_eq_10(index, images, kind):
    rows = [3, 17, -1, 40]
    labels = torch.tensor([3, 0, 1, 0])  # image 3 has label 3: y_N = y; image 17 has 2: y_N ≠ y
    network, plain = prediction_near(images, rows, kind, labels=labels)
    threshold = ThresholdSchedule(-1.0, -0.7, 0.025)
    c1, c2, c3 = 2.0, 1.5, 0.3
    guided = AntiMemorizationGuidance(index, NormalizedL2(), threshold, c1, c2, c3)(plain)

    a, references = ALPHA_BAR, images.flatten(1).double().numpy()
    level = -1.0 + 0.3 * np.exp(-0.025 * 250 * 0.2)
    for i in range(4):
        x_0 = plain.clean_estimate()[i].double().flatten().numpy()
        distances = np.sqrt(((x_0 - references) ** 2).sum(axis=1))
        order = np.argsort(distances)
        mean = distances[order[:50]].mean()
        sigma = -distances[order[0]] / (0.5 * mean)
        assert guided.trace["sigma"][i].item() == pytest.approx(sigma, rel=1e-5)
        if sigma <= level:
            assert torch.equal(guided.output[i], plain.output[i])
            continue
        strength = sigma - level
        s_1 = np.clip(c1 * strength, 0, 2.0)
        s_2 = np.clip(c2 * strength, 0, 2.0 - s_1)
        x_t = plain.x_t[i].double().numpy()

        def to_eps(output, x_t=x_t):
            output = output.double().numpy()
            return output if kind == "epsilon" else np.sqrt(a) * output + np.sqrt(1 - a) * x_t

        cond, uncond = to_eps(plain.output_cond[i]), to_eps(plain.output_uncond[i])
        y_n = int(order[0]) % 5
        same = y_n == int(labels[i])
        other = (
            plain.output_cond[i]
            if same
            else Network()(plain.x_t[i : i + 1], torch.tensor([y_n]))[0]
        )
        gradient = -(x_0 - references[order[0]]) / (distances[order[0]] * 0.5 * mean) / np.sqrt(a)
        expected = (
            to_eps(plain.output[i])
            - s_1 * (cond - uncond)
            - s_2 * (to_eps(other) - uncond)
            + c3 * np.sqrt(1 - a) * gradient.reshape(1, 4, 4)
        )
        np.testing.assert_allclose(to_eps(guided.output[i]), expected, atol=2e-5)
    assert guided.active.tolist() == [True, True, False, True]
    assert network.calls == [1]  # one row: image 17; image 3's y_N is y, image 40's label is 0 = y


def test_inactive_rows_keep_their_bits_and_cost_nothing(index, images):
    network, plain = prediction_near(images, [-1, 5, -1, -1])
    guided = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(-0.5), c1=1.0, c2=1.0, c3=10.0
    )(plain)
    assert guided.active.tolist() == [False, True, False, False]
    for i in (0, 2, 3):
        assert torch.equal(guided.output[i], plain.output[i])
    assert not torch.equal(guided.output[1], plain.output[1])
    assert sum(network.calls) <= 1


def test_no_active_row_returns_the_same_bits(index, images):
    network, plain = prediction_near(images, [-1, -1])
    guided = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(0.0), c1=1.0, c2=1.0, c3=10.0
    )(plain)
    assert torch.equal(guided.output, plain.output)
    assert network.calls == []


def test_zero_strengths_equal_no_guidance_bit_for_bit(index, images):
    _, plain = prediction_near(images, [3, 4, -1])
    guided = SteadyAMG(index, NormalizedL2(), ANY, gated=False)(plain)
    assert guided.active.all()
    assert torch.equal(guided.output, plain.output)


def test_ungated_mode_guides_everyone(index, images):
    _, plain = prediction_near(images, [3, -1, -1])
    guided = SteadyAMG(index, NormalizedL2(), ANY, c3=1.0, gated=False)(plain)
    assert guided.active.all()
    changed = (guided.output != plain.output).flatten(1).any(dim=1)
    assert changed.all()


def test_no_classifier_free_guidance_means_no_s1_and_s2(index, images):
    _, plain = prediction_near(images, [3, 4], s_0=1.0)
    guided = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(-2.0), c1=9.0, c2=9.0
    )(plain)
    assert torch.equal(guided.output, plain.output)
    assert guided.trace["s1"].abs().max() == 0


def test_gradient_through_the_denoiser_is_that_of_finite_differences(index, images):
    network, plain = prediction_near(images, [3], distance=0.2)
    assert not AntiMemorizationGuidance(index, NormalizedL2(), ANY, c3=1.0).calls_denoiser
    # Make the record consistent with the network, so that a second call means the same.
    cond, uncond = network(plain.x_t, plain.conditions), network(plain.x_t, None)
    plain = plain.with_branches(cond, uncond)
    guidance = SteadyAMG(index, NormalizedL2(), ANY, c3=1.0, gradient="denoiser", gated=False)
    assert guidance.calls_denoiser
    guided = guidance(plain)
    g_sim = (guided.output - plain.output)[0].double().flatten().numpy()
    match = NormalizedL2()(index, plain.clean_estimate())
    references = images.flatten(1).double().numpy()[match.rows[0].numpy()]
    a = ALPHA_BAR

    def clean(x_t):
        uncond = 0.3 * x_t
        eps = uncond + 3.0 * (0.3 * x_t + 0.1 - uncond)
        return (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)

    x_t = plain.x_t[0].double().flatten().numpy()
    mean = np.sqrt(((clean(x_t) - references) ** 2).sum(axis=1)).mean()

    def sigma(x):
        return -np.sqrt(((clean(x) - references[0]) ** 2).sum()) / (0.5 * mean)

    for j in range(16):
        step = np.zeros(16)
        step[j] = 1e-6
        slope = (sigma(x_t + step) - sigma(x_t - step)) / 2e-6
        assert g_sim[j] == pytest.approx(np.sqrt(1 - a) * slope, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_final_correction_leaves_nothing_above_its_target(index, images, kind):
    _, plain = prediction_near(images, [3, 4, -1, 9], kind, distance=0.05, last=True)
    guidance = SteadyAMG(index, NormalizedL2(), ConstantThreshold(0.0), final_correction=-0.8)
    x_0 = guidance(plain).clean_estimate()
    returned = x_0.clamp(-1, 1)
    assert (NormalizedL2()(index, returned).sigma <= -0.8 + 1e-5).all()
    before = NormalizedL2()(index, plain.clean_estimate().clamp(-1, 1)).sigma
    assert (before > -0.8).sum() >= 3
    untouched = before <= -0.8
    assert torch.equal(guidance(plain).output[untouched], plain.output[untouched])
    # Only the last step corrects.
    _, early = prediction_near(images, [3, 4, -1, 9], kind, distance=0.05)
    assert torch.equal(guidance(early).output, early.output)


def test_final_correction_moves_latents_by_what_they_decode_to(index, images):
    """x̂_0 at half the images' scale, decoded by doubling: the decoded images leave the copies."""
    _, plain = prediction_near(0.5 * images, [3, 4, 9], distance=0.02, last=True)
    plain = replace(plain, decode=lambda latent: 2 * latent, image_range=None)
    guidance = SteadyAMG(index, NormalizedL2(), ConstantThreshold(0.0), final_correction=-0.8)
    assert (NormalizedL2()(index, 2 * plain.clean_estimate()).sigma > -0.8).all()
    returned = guidance(plain).clean_estimate()
    assert (NormalizedL2()(index, 2 * returned).sigma <= -0.8 + 1e-5).all()


def test_no_further_call_where_despecification_leaves_nothing_to_deduplicate(index, images):
    """s_1 = s_0 − 1 makes s_2 = 0 (eq. 15), whatever y_N is."""
    network, plain = prediction_near(images, [3, 17])
    amg = AntiMemorizationGuidance(index, NormalizedL2(), ANY, c1=1e4, c2=1.0)
    guided = amg(plain)
    assert (guided.trace["s1"] == 2.0).all() and (guided.trace["s2"] == 0.0).all()
    assert network.calls == []


def test_below_the_gate_an_open_gate_leaves_distances_to_dissimilarity(index, images):
    """nL2's strength is how far σ is above the gate: c_1 and c_2 have nothing to multiply there."""
    _, plain = prediction_near(images, [-1, -1])
    guided = SteadyAMG(index, NormalizedL2(), ConstantThreshold(0.0), c1=5.0, c2=5.0, gated=False)(
        plain
    )
    assert guided.active.all()
    assert torch.equal(guided.output, plain.output)


def test_observer_records_and_changes_nothing(index, images):
    _, plain = prediction_near(images, [3, -1])
    seen = Observer(index, NormalizedL2(), ConstantThreshold(-0.5))(plain)
    assert torch.equal(seen.output, plain.output)
    assert seen.trace["nearest"][0].item() == 3
    assert seen.active is None


@pytest.mark.parametrize("option", ["c1", "c2", "c3", "gate_margin", "margin_per_doubling"])
def test_negative_strengths_are_refused(index, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 0"):
        SteadyAMG(index, NormalizedL2(), ANY, **{option: -1.0})
