"""AMG's gate and what it leaves: margins, the least scale, a gate that stays open."""

from dataclasses import replace

import pytest
import torch
from amg_steps import ANY, make_images, make_index, prediction_near

from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    NormalizedL2,
    Observer,
    SteadyAMG,
)
from memfree.guidance.prediction import combine
from memfree.retrieval import ReferenceIndex


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def index(images):
    return make_index(images)


@pytest.fixture
def repeated(images):
    """Image 5 has three records; 9 and 10 are near copies of one each, which makes two."""
    counts, groups = torch.ones(80, dtype=torch.int64), torch.arange(80)
    counts[5], groups[10] = 3, 9
    return ReferenceIndex.build(images, labels=torch.arange(80) % 5, counts=counts, groups=groups)


def test_gate_margin_opens_earlier(index, images):
    _, plain = prediction_near(images, [3, 4], distance=0.3)
    sigma = NormalizedL2()(index, plain.clean_estimate()).sigma
    level = float(sigma.min()) + 0.05
    narrow = AntiMemorizationGuidance(index, NormalizedL2(), ConstantThreshold(level), c3=1.0)
    wide = SteadyAMG(index, NormalizedL2(), ConstantThreshold(level), c3=1.0, gate_margin=0.1)
    assert int(narrow(plain).active.sum()) < int(wide(plain).active.sum()) == 2


def test_the_margin_grows_with_log_2_of_the_records_of_the_nearest_image(images):
    counts = torch.ones(80, dtype=torch.int64)
    counts[5], counts[9], counts[30] = 64, 4, 3
    # Images 30 and 31 are near copies: one group of 4 records.
    groups = torch.arange(80)
    groups[31] = 30
    index = ReferenceIndex.build(images, counts=counts, groups=groups)
    _, plain = prediction_near(images, [5, 9, 17, 30, 31], distance=0.3)
    sigma = Observer(index, NormalizedL2(), ANY)(plain).trace["sigma"]
    doublings = torch.tensor([6.0, 2.0, 0.0, 2.0, 2.0])
    for row in range(5):
        # λ is so high above this row's σ that the gate is only just open, or only just shut.
        for error, open_ in ((-1e-3, True), (1e-3, False)):
            level = float(sigma[row]) + 0.25 + 0.1 * float(doublings[row]) + error
            amg = SteadyAMG(
                index,
                NormalizedL2(),
                ConstantThreshold(level),
                c3=1.0,
                gate_margin=0.25,
                margin_per_doubling=0.1,
            )
            assert bool(amg(plain).active[row]) is open_
            expected = sigma > level - 0.25 - 0.1 * doublings
            assert amg(plain).active.tolist() == expected.tolist()


def test_strengths_of_distances_start_at_the_gate_with_its_margin(index, images):
    """nL2's strength is σ_t above the gate, which a margin lowers, by the image's records too."""
    index = ReferenceIndex.build(images, counts=torch.full((80,), 8))
    _, plain = prediction_near(images, [5, 17], distance=0.3, s_0=50.0)
    sigma = Observer(index, NormalizedL2(), ANY)(plain).trace["sigma"]
    level = float(sigma.max()) + 0.5
    amg = SteadyAMG(
        index,
        NormalizedL2(),
        ConstantThreshold(level),
        c1=2.0,
        gate_margin=0.5,
        margin_per_doubling=0.1,
        gated=False,
    )
    expected = (2.0 * (sigma - (level - 0.5 - 3 * 0.1))).clamp(min=0)
    torch.testing.assert_close(amg(plain).trace["s1"], expected)


def test_despecification_goes_down_to_the_least_scale_for_repeated_images(repeated, images):
    # The images' labels are those that are asked for: G_dup alone leaves what G_spe does.
    _, plain = prediction_near(images, [5, 8, 9], labels=torch.tensor([0, 3, 4]))
    for least in (1.0, 0.0, 0.5):
        for strengths in ({"c1": 1e6, "c2": 1e6}, {"c1": 1e6}, {"c2": 1e6}):
            amg = SteadyAMG(repeated, NormalizedL2(), ANY, **strengths, least_scale=least)
            output = amg(plain).output
            for row, scale in ((0, least), (1, 1.0), (2, least)):
                expected = combine(plain.output_cond[row], plain.output_uncond[row], scale)
                torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=0)


def test_a_latched_gate_keeps_despecification_and_not_dissimilarity(repeated, images):
    labels = torch.tensor([0, 0, 3])
    _, near = prediction_near(images, [5, -1, 8], labels=labels)
    _, far = prediction_near(images, [-1, -1, -1], labels=labels)
    _, other = prediction_near(images, [-1, 17, -1], labels=torch.tensor([0, 2, 3]))
    for latched in (False, True):
        near.memory.clear()
        amg = SteadyAMG(
            repeated, NormalizedL2(), ANY, c1=1e6, c3=10.0, least_scale=0.0, latched=latched
        )
        first = amg(near)
        second = amg(replace(far, memory=near.memory, step=1))
        assert first.active.tolist() == [True, False, True]
        assert second.active.tolist() == [latched, False, False]
        assert torch.equal(second.output[1:], far.output[1:])
        assert second.trace["g_sim_norm"].tolist() == [0.0, 0.0, 0.0]
        if latched:
            torch.testing.assert_close(second.output[0], far.output_uncond[0])
            assert second.trace["s1"].tolist() == [3.0, 0.0, 0.0]
        # Another sample comes near an image: it alone is moved away from one.
        third = amg(replace(other, memory=near.memory, step=2))
        assert third.active.tolist() == [latched, True, False]
        assert third.trace["s1"].tolist() == [3.0 if latched else 0.0, 2.0, 0.0]
        assert (third.trace["g_sim_norm"] > 0).tolist() == [False, True, False]


def test_a_latched_gate_remembers_the_highest_sigma_since_it_opened(repeated, images):
    """s_1 = c_1·(σ − λ) of the highest σ so far, of every sample by itself; not before it opens."""
    amg, forgetful = (
        SteadyAMG(repeated, NormalizedL2(), ANY, c1=1.0, latched=latched)
        for latched in (True, False)
    )
    observer, memory, highest = Observer(repeated, NormalizedL2(), ANY), {}, [None, None]
    # The first comes nearest in the second step; the second opens its gate in the third only.
    steps = [((5, 0.1), (-1, 0.0)), ((5, 0.02), (-1, 0.0)), ((5, 0.1), (9, 0.1)), ((-1, 0.0),) * 2]
    for step, places in enumerate(steps):
        parts = [prediction_near(images, [row], distance=d)[1] for row, d in places]
        plain = replace(
            parts[0],
            memory=memory,
            step=step,
            conditions=torch.zeros(2, dtype=torch.int64),
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("x_t", "output", "output_cond", "output_uncond")
            },
        )
        sigma = observer(replace(plain, memory={})).trace["sigma"].tolist()
        for row, value in enumerate(sigma):
            if highest[row] is not None or value > -0.5:
                highest[row] = max(value, highest[row] or -9.0)
        now = [max(value + 0.5, 0.0) for value in sigma]
        assert forgetful(plain).trace["s1"].tolist() == pytest.approx(now, abs=1e-5)
        guided = amg(plain)
        assert guided.active.tolist() == [value is not None for value in highest]
        expected = [0.0 if value is None else value + 0.5 for value in highest]
        assert guided.trace["s1"].tolist() == pytest.approx(expected, abs=1e-5)
    assert highest[0] > -0.2 and highest[1] is not None


def test_two_latched_guidances_keep_their_own_gates(repeated, images):
    _, near = prediction_near(images, [5])
    first, second = (
        SteadyAMG(repeated, NormalizedL2(), ConstantThreshold(level), latched=True)
        for level in (-0.5, 0.0)
    )
    assert first(near).active.tolist() == [True]
    assert second(near).active.tolist() == [False]


def test_dissimilarity_is_taken_where_the_sample_was_detected(index, images):
    """∇σ is that of x̂_0 before G_spe moves it: both corrections are added to one prediction."""
    _, plain = prediction_near(images, [5, 17], distance=0.1)
    alone = [
        SteadyAMG(index, NormalizedL2(), ANY, **{name: value})(plain).output
        for name, value in (("c1", 2.0), ("c3", 1.0))
    ]
    both = AntiMemorizationGuidance(index, NormalizedL2(), ANY, c1=2.0, c3=1.0)(plain).output
    expected = alone[0] + alone[1] - plain.output
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_a_scale_of_one_or_less_is_despecified_down_to_a_least_scale(repeated, images, scale):
    _, plain = prediction_near(images, [5], s_0=scale)
    amg = SteadyAMG(repeated, NormalizedL2(), ANY, c1=1e6, least_scale=0.0)
    torch.testing.assert_close(amg(plain).output, plain.output_uncond, atol=1e-5, rtol=0)


@pytest.mark.parametrize("least", [-0.1, 1.1])
def test_a_least_scale_outside_0_and_1_is_refused(index, least):
    with pytest.raises(ValueError, match=r"least_scale must be in \[0, 1\]"):
        SteadyAMG(index, NormalizedL2(), ANY, least_scale=least)
