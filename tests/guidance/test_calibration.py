"""Thresholds and p-values against counting by hand."""

import json

import numpy as np
import pytest
import torch

from memfree.guidance import (
    Calibration,
    NormalizedL2,
    calibrate,
    calibration_of,
    default_similarity,
)
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


def test_bootstrap_interval_covers_the_threshold(calibration):
    low, high = calibration.threshold_interval(0.05)
    assert low <= calibration.threshold(0.05) <= high
    assert high - low > 0.01


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
