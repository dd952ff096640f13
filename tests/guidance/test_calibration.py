"""Thresholds and p-values against counting by hand."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from memfree.guidance import (
    Calibration,
    NormalizedL2,
    calibrate,
    calibration_of,
    default_similarity,
)
from memfree.guidance.calibration import Judge
from memfree.retrieval import ReferenceIndex


@pytest.fixture
def calibration():
    rng = np.random.default_rng(0)
    return Calibration("nl2-k50-a0.5", torch.tensor(np.sort(rng.normal(-1, 0.2, 600))).float())


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_threshold_and_p_value_say_the_same(calibration, rate):
    threshold = calibration.threshold(rate)
    sigma = torch.linspace(-2, 0, 4001)
    assert torch.equal(sigma > threshold, calibration.p_values(sigma) <= rate + 1e-9)
    assert (calibration.sigmas > threshold).float().mean() <= rate


def test_p_value_counts(calibration):
    for sigma in (-3.0, -1.0, -0.5, 0.0, calibration.sigmas[17].item()):
        at_least = int((calibration.sigmas.numpy() >= np.float32(sigma)).sum())
        expected = (1 + at_least) / 601
        assert calibration.p_values(torch.tensor([sigma])).item() == pytest.approx(expected)


def test_p_values_of_exchangeable_images_are_valid():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = torch.tensor(rng.normal(size=101)).float()
        made = Calibration("x", values[:100].sort().values)
        hits += bool(made.p_values(values[100:]) <= 0.1)
    assert hits / 200 < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 200)


def test_a_rate_below_five_images_is_refused(calibration):
    with pytest.raises(ValueError, match="false_positive_rate 0.001 cannot be calibrated on 600"):
        calibration.threshold(0.001)
    with pytest.raises(ValueError, match="false_positive_rate"):
        calibration.threshold(1.0)


def test_a_thresholds_own_uncertainty_is_that_of_its_order_statistic():
    """6 of 600 lie at or above it: 0.4 to 1.9 % of real images are called copies, not 1 %."""
    some = Calibration("x", torch.arange(600.0))
    expected = stats.beta.ppf([0.025, 0.975], 6, 595)
    assert some.rate_limits(0.01) == pytest.approx(tuple(expected))
    assert some.rate_text(0.01) == "1 % (0.37–1.9 %, from 600 images)"


@pytest.mark.parametrize(("n", "rate"), [(600, 0.01), (100, 0.05), (200, 0.5)])
def test_limits_of_rate_and_threshold_cover_the_population(n, rate):
    generator = np.random.default_rng(0)
    inside = np.zeros(2)
    for _ in range(400):
        some = Calibration("x", torch.tensor(np.sort(generator.normal(size=n))).float())
        low, high = some.rate_limits(rate)
        inside[0] += low <= stats.norm.sf(some.threshold(rate)) <= high
        low, high = some.threshold_interval(rate)
        inside[1] += low <= stats.norm.isf(rate) <= high
    assert (inside / 400 >= 0.92).all() and (inside / 400 <= 0.995).all()


def test_json_round_trip(calibration):
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert torch.equal(again.sigmas, calibration.sigmas)
    rates = [entry["false_positive_rate"] for entry in calibration.to_json()["thresholds"]]
    assert rates == [0.01, 0.05, 0.5]


@pytest.mark.parametrize("value", [{}, {"similarity": "x", "sigmas": []}, {"sigmas": "no"}, []])
def test_a_broken_calibration_is_refused(value):
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(value)


def test_calibrate_keeps_the_result_with_the_index(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(400, 1, 4, 4, generator=generator) * 2 - 1
    index = ReferenceIndex.build(images[:100])
    similarity = NormalizedL2()
    with pytest.raises(ValueError, match="no calibration"):
        calibration_of(index, similarity)
    threshold = calibrate(index, similarity, images[100:], false_positive_rate=0.05)
    sigma = similarity(index, images[100:]).sigma
    assert int((sigma > threshold).sum()) == 14  # rank ⌊0.05·301⌋ = 15 is the threshold itself
    index.save(tmp_path / "index")
    again = calibration_of(ReferenceIndex.load(tmp_path / "index"), similarity)
    assert again.threshold(0.05) == pytest.approx(threshold)


def test_calibration_needs_images():
    index = ReferenceIndex.build(torch.rand(60, 1, 4, 4))
    with pytest.raises(ValueError, match="held-out"):
        calibrate(index, NormalizedL2(), torch.empty(0, 1, 4, 4))


def test_distances_to_one_group_are_no_measure():
    """nL2 = ℓ2/(½·ℓ2) = 2 whatever the image: nothing would be near."""
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    one = ReferenceIndex.build(images, groups=[0, 0, 0])
    assert NormalizedL2(k=1)(one, images + 0.1).sigma.tolist() == pytest.approx([-2] * 3)
    with pytest.raises(ValueError, match="one group of images, and nL2 .* at least 2 distinct"):
        default_similarity(one)
    assert default_similarity(ReferenceIndex.build(images, groups=[0, 0, 1])).k == 2


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_a_judge_says_what_similarity_and_calibration_say(batch_size):
    images = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index, similarity, matches = ReferenceIndex.build(images[:100]), NormalizedL2(), []
    calibrate(index, similarity, images[100:], 0.1)
    judge = Judge(index, similarity, calibration_of(index, similarity), 0.1)
    sigma, row, p_value, copy = judge(images, batch_size, matches.append)
    expected = similarity(index, images)
    torch.testing.assert_close(sigma.float(), expected.sigma)
    assert row.tolist() == expected.rows[:, 0].tolist()
    assert torch.equal(torch.cat([match.sigma for match in matches]).double(), sigma)
    assert torch.equal(copy, p_value <= 0.1 + 1e-9) and copy[:100].all()
    assert torch.equal(p_value, judge.calibration.p_values(sigma))
