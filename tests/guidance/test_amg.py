"""AMG as a whole: the paper's formula, who pays, who keeps their bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    GuidanceSettings,
    NormalizedL2,
    Observer,
    Prediction,
    ThresholdSchedule,
    calibrate,
)
from memfree.guidance.prediction import combine
from memfree.retrieval import ReferenceIndex

ALPHA_BAR = 0.6
ANY = ConstantThreshold(-0.5)


@pytest.fixture
def images():
    return torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def index(images):
    return ReferenceIndex.build(images, labels=torch.arange(80) % 5)


class Network:
    """A linear denoiser that knows its conditions and counts the rows it is asked for."""

    def __init__(self, kind="epsilon"):
        self.calls = []
        self.kind = kind

    def __call__(self, x_t, conditions):
        self.calls.append(len(x_t))
        shift = 0.0 if conditions is None else 0.1 * (1 + conditions.view(-1, 1, 1, 1))
        return 0.3 * x_t + shift


def prediction_near(images, rows, kind="epsilon", s_0=3.0, distance=0.02, labels=None, last=False):
    """A step whose x̂_0 lies near the given training images (row −1: near none)."""
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(len(rows), 1, 4, 4, generator=generator)
    network = Network(kind)
    y = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels
    far = torch.rand(len(rows), 1, 4, 4, generator=generator) * 2 - 1
    x_0 = torch.stack([far[i] if row < 0 else images[row] for i, row in enumerate(rows)])
    x_0 = x_0 + distance * torch.randn(x_0.shape, generator=generator)
    a = torch.tensor(ALPHA_BAR)
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    output = eps if kind == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    uncond = network(x_t, None)
    cond = uncond + (output - uncond) / s_0
    network.calls.clear()
    return network, Prediction(
        x_t=x_t,
        alpha_bar=a,
        time=0.2,
        output=combine(cond, uncond, s_0),
        output_cond=cond,
        output_uncond=uncond,
        conditions=y,
        guidance_scale=s_0,
        prediction_type=kind,
        denoise=network,
        is_last=last,
        image_range=1.0,
    )


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
    guided = AntiMemorizationGuidance(index, NormalizedL2(), ANY, gated=False)(plain)
    assert guided.active.all()
    assert torch.equal(guided.output, plain.output)


def test_ungated_mode_guides_everyone(index, images):
    _, plain = prediction_near(images, [3, -1, -1])
    guided = AntiMemorizationGuidance(index, NormalizedL2(), ANY, c3=1.0, gated=False)(plain)
    assert guided.active.all()
    changed = (guided.output != plain.output).flatten(1).any(dim=1)
    assert changed.all()


def test_gate_margin_opens_earlier(index, images):
    _, plain = prediction_near(images, [3, 4], distance=0.3)
    sigma = NormalizedL2()(index, plain.clean_estimate()).sigma
    level = float(sigma.min()) + 0.05
    narrow = AntiMemorizationGuidance(index, NormalizedL2(), ConstantThreshold(level), c3=1.0)
    wide = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(level), c3=1.0, gate_margin=0.1
    )
    assert int(narrow(plain).active.sum()) < int(wide(plain).active.sum()) == 2


def test_the_margin_grows_with_the_records_of_the_nearest_image(images):
    counts = torch.ones(80, dtype=torch.int64)
    counts[5] = 64
    index = ReferenceIndex.build(images, counts=counts)
    _, plain = prediction_near(images, [5, 17], distance=0.3)
    sigma = Observer(index, NormalizedL2(), ANY)(plain).trace["sigma"]
    level = float(sigma.max()) + 0.55  # 5 · 0.1 < 0.55 < 6 · 0.1, and 64 = 2^6
    for per_doubling, expected in ((0.0, [False, False]), (0.1, [True, False])):
        guided = AntiMemorizationGuidance(
            index,
            NormalizedL2(),
            ConstantThreshold(level),
            c3=1.0,
            gate_margin=abs(float(sigma[0] - sigma[1])),
            margin_per_doubling=per_doubling,
        )(plain)
        assert guided.active.tolist() == expected


@pytest.fixture
def repeated(images):
    """Image 5 has three records, all others one."""
    counts = torch.ones(80, dtype=torch.int64)
    counts[5] = 3
    return ReferenceIndex.build(images, labels=torch.arange(80) % 5, counts=counts)


def test_despecification_goes_down_to_the_least_scale_for_repeated_images(repeated, images):
    _, plain = prediction_near(images, [5, 8], labels=torch.tensor([0, 3]))
    for least in (1.0, 0.0, 0.5):
        amg = AntiMemorizationGuidance(
            repeated, NormalizedL2(), ANY, c1=1e6, c2=1e6, least_scale=least
        )
        output = amg(plain).output
        for row, scale in ((0, least), (1, 1.0)):
            expected = combine(plain.output_cond[row], plain.output_uncond[row], scale)
            torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=0)


def test_a_latched_gate_keeps_despecification_and_not_dissimilarity(repeated, images):
    _, near = prediction_near(images, [5, -1, 8], labels=torch.tensor([0, 0, 3]))
    _, far = prediction_near(images, [-1, -1, -1], labels=torch.tensor([0, 0, 3]))
    far = replace(far, memory=near.memory, step=1)
    for latched in (False, True):
        near.memory.clear()
        amg = AntiMemorizationGuidance(
            repeated, NormalizedL2(), ANY, c1=1e6, c3=10.0, least_scale=0.0, latched=latched
        )
        first, second = amg(near), amg(far)
        assert first.active.tolist() == [True, False, True]
        assert second.active.tolist() == [latched, False, False]
        assert torch.equal(second.output[1:], far.output[1:])
        assert second.trace["g_sim_norm"].tolist() == [0.0, 0.0, 0.0]
        if latched:
            torch.testing.assert_close(second.output[0], far.output_uncond[0])
            assert second.trace["s1"].tolist() == [3.0, 0.0, 0.0]


def test_a_latched_gate_remembers_the_highest_sigma(repeated, images):
    amg = AntiMemorizationGuidance(repeated, NormalizedL2(), ANY, c1=1.0, latched=True)
    memory = {}
    strengths = []
    for step, distance in enumerate((0.1, 0.02, 0.1)):
        _, plain = prediction_near(images, [5], distance=distance, labels=torch.tensor([0]))
        strengths.append(float(amg(replace(plain, memory=memory, step=step)).trace["s1"]))
    assert strengths[0] < strengths[1] == strengths[2]


def test_no_classifier_free_guidance_means_no_s1_and_s2(index, images):
    _, plain = prediction_near(images, [3, 4], s_0=1.0)
    guided = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(-2.0), c1=9.0, c2=9.0
    )(plain)
    assert torch.equal(guided.output, plain.output)
    assert guided.trace["s1"].abs().max() == 0


def test_gradient_through_the_denoiser_is_that_of_finite_differences(index, images):
    network, plain = prediction_near(images, [3], distance=0.2)
    # Make the record consistent with the network, so that a second call means the same.
    cond, uncond = network(plain.x_t, plain.conditions), network(plain.x_t, None)
    plain = plain.with_branches(cond, uncond)
    guidance = AntiMemorizationGuidance(
        index, NormalizedL2(), ANY, c3=1.0, gradient="denoiser", gated=False
    )
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
    guidance = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(0.0), final_correction=-0.8
    )
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
    guidance = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(0.0), final_correction=-0.8
    )
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
    guided = AntiMemorizationGuidance(
        index, NormalizedL2(), ConstantThreshold(0.0), c1=5.0, c2=5.0, gated=False
    )(plain)
    assert guided.active.all()
    assert torch.equal(guided.output, plain.output)


def test_observer_records_and_changes_nothing(index, images):
    _, plain = prediction_near(images, [3, -1])
    seen = Observer(index, NormalizedL2(), ConstantThreshold(-0.5))(plain)
    assert torch.equal(seen.output, plain.output)
    assert seen.trace["nearest"][0].item() == 3
    assert seen.active is None


def test_recommended_settings_are_switched_on_and_calibrated(index, images):
    held_out = torch.rand(600, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
    threshold = calibrate(index, NormalizedL2(), held_out)
    amg = AntiMemorizationGuidance.recommended(index)
    assert amg.threshold(0.0) == pytest.approx(threshold)
    assert amg.threshold(1.0) < threshold
    assert amg.c1 > 0 and amg.c2 > 0 and amg.c3 > 0
    assert amg.gate_margin > 0 and amg.max_displacement is not None
    assert amg.final_correction is not None and amg.final_correction < threshold
    paper = AntiMemorizationGuidance(index, NormalizedL2(), ThresholdSchedule(-1.95, -1.5), 1, 1, 1)
    assert paper.gate_margin == 0
    assert paper.max_displacement is None and paper.final_correction is None


def test_settings_build_what_they_name(index, images):
    held_out = torch.rand(600, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
    with pytest.raises(ValueError, match="no calibration"):
        GuidanceSettings(mitigation="amg").build(index)
    calibrate(index, NormalizedL2(), held_out)
    names = {
        mitigation: [type(one).__name__ for one in GuidanceSettings(mitigation).build(index)]
        for mitigation in ("none", "amg", "multiplicity", "both")
    }
    assert names == {
        "none": ["Observer"],
        "amg": ["AntiMemorizationGuidance"],
        "multiplicity": ["MultiplicityGuidance", "Observer"],
        "both": ["MultiplicityGuidance", "AntiMemorizationGuidance"],
    }
    constant = GuidanceSettings("amg", schedule="constant").build(index)[0]
    assert constant.threshold(0.0) == constant.threshold(1.0)


@pytest.mark.parametrize("option", ["c1", "c2", "c3", "gate_margin"])
def test_negative_strengths_are_refused(index, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 0"):
        AntiMemorizationGuidance(index, NormalizedL2(), ANY, **{option: -1.0})
