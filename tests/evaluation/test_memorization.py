"""Rates, dose-response and fair share, against counts made by hand."""

import numpy as np
import pytest
import torch

from memfree.evaluation.intervals import wilson
from memfree.evaluation.memorization import (
    allowed_rates,
    class_weights,
    copy_metrics,
    distance_metrics,
    duplicated_share_metrics,
    factor_metrics,
    images_per_factor,
    paired_metrics,
    same_image_metrics,
)
from memfree.evaluation.metrics import MetricTable
from memfree.evaluation.neighbours import Neighbours, distance_ratio


def neighbours(nl2, multiplicity=None, ratio=None, threshold=-0.66):
    nl2 = np.asarray(nl2, dtype=float)
    n = len(nl2)
    return Neighbours(
        sigma=-nl2,
        row=np.zeros(n, int),
        multiplicity=np.ones(n, int) if multiplicity is None else np.asarray(multiplicity),
        distance_ratio=np.ones(n) if ratio is None else np.asarray(ratio),
        p_value=np.ones(n),
        copy=-nl2 > threshold,
    )


def test_copies_lie_above_the_threshold_in_sigma():
    found = neighbours([0.2, 0.65, 0.66, 0.9])
    table = MetricTable(copy_metrics("x", found, {0.01: -0.66, 0.05: -0.8}, 0.01, "nl2"))
    copies = table.get("copies", "x")
    assert (copies.value, copies.count, copies.detail["copies"]) == (0.5, 4, 2)
    assert (copies.low, copies.high) == (wilson(2, 4).low, wilson(2, 4).high)
    assert copies.detail["threshold"] == -0.66
    assert table.get("copies_at_0.05", "x").value == 0.75


def test_distances_are_those_of_numpy():
    nl2 = np.random.default_rng(0).uniform(0.1, 2, 300)
    ratio = np.linspace(0, 1, 300)
    table = MetricTable(distance_metrics("x", neighbours(nl2, ratio=ratio), nl2=True))
    assert table.get("nl2_5th_percentile", "x").value == pytest.approx(np.percentile(nl2, 5))
    assert table.get("nl2_minimum", "x").value == nl2.min()
    assert table.get("nl2_below_1.4", "x").value == (nl2 < 1.4).mean()
    assert table.get("distance_ratio_below_third", "x").value == (ratio < 1 / 3).mean()


def test_no_nl2_for_a_similarity_that_is_none():
    names = MetricTable(distance_metrics("x", neighbours([0.1]), nl2=False)).names()
    assert names == ["distance_ratio_below_third"]


def test_distance_ratio_of_distances_and_of_cosines():
    assert distance_ratio(torch.tensor([[1.0, 4.0], [0.0, 0.0]]), "l2").tolist() == [0.25, 1.0]
    vectors = torch.nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=1)
    cosines = (vectors[0] @ vectors[1:].T).sort(descending=True).values[None]
    distances = torch.cdist(vectors[:1], vectors[1:]).sort().values
    expected = (distances[0, 0] / distances[0, 1]).item()
    assert distance_ratio(cosines, "cosine").item() == pytest.approx(expected)


def test_copies_of_a_factor_by_hand():
    # Two images of factor 64, three of factor 1; six samples.
    found = neighbours([0.1, 0.2, 0.9, 0.1, 0.1, 2.0], multiplicity=[64, 64, 64, 64, 1, 1])
    table = MetricTable(factor_metrics("x", found, {1: 3, 64: 2}))
    duplicated = table.get("copies_of_factor_64", "x")
    assert (duplicated.value, duplicated.detail["copies"]) == (3 / 6, 3)
    assert table.get("copies_of_factor_1", "x").value == pytest.approx(1 / 6)
    assert table.get("copies_per_image_of_factor_64", "x").value == pytest.approx(3 / 2)
    assert table.get("copies_per_image_of_factor_1", "x").value == pytest.approx(1 / 3)


def test_images_of_a_factor_are_groups_not_rows():
    groups = np.array([0, 0, 1, 2, 2, 2])
    multiplicity = np.array([4, 4, 1, 4, 4, 4])
    assert images_per_factor(groups, multiplicity) == {1: 1, 4: 2}


def test_fair_share_takes_the_class_mix_of_the_samples():
    # Class 0: 1 of 4 test images is near a duplicated one; class 1: 1 of 2. Samples: 1 to 3.
    labels = np.array([0, 0, 0, 0, 1, 1])
    heldout = np.array([True, False, False, False, True, False])
    weights = class_weights(labels, np.array([0, 1, 1, 1]), 6)
    assert weights.tolist() == [0.25 / 4] * 4 + [0.75 / 2] * 2
    duplicated = np.array([True, True, True, False])
    table = MetricTable(duplicated_share_metrics("x", duplicated, heldout, weights, seed=0))
    fair = 0.25 * 1 / 4 + 0.75 * 1 / 2
    assert table.get("duplicated_share", "x").value == 0.75
    assert table.get("duplicated_fair_share", "x").value == pytest.approx(fair)
    ratio = table.get("duplicated_share_ratio", "x")
    assert ratio.value == pytest.approx(0.75 / fair)
    assert ratio.low < ratio.value < ratio.high


def test_no_ratio_to_a_fair_share_of_zero():
    table = MetricTable(
        duplicated_share_metrics("x", np.array([True]), np.zeros(5, bool), np.ones(5), seed=0)
    )
    assert table.get("duplicated_share_ratio", "x") is None
    assert table.get("duplicated_fair_share", "x").high > 0


def test_a_class_without_test_images_is_left_out_of_the_mix():
    weights = class_weights(np.array([0, 1, 1]), np.array([1, 7]), 3)
    assert weights.tolist() == [0, 0.25, 0.25]
    assert class_weights(np.array([0, 1]), np.array([7]), 2).tolist() == [1, 1]


def test_without_labels_all_weights_are_one():
    assert class_weights(None, np.array([1]), 3).tolist() == [1, 1, 1]
    assert class_weights(np.array([0, 1]), None, 2).tolist() == [1, 1]


def test_paired_metrics_name_their_reference():
    own, others = np.array([False, False, True]), np.array([True, True, True])
    (difference,) = paired_metrics("amg", "unguided", {"copies": (own, others)})
    assert difference.metric == "copies_difference"
    assert difference.value == pytest.approx(-2 / 3)
    assert difference.detail["reference"] == "unguided"


def test_no_false_positive_rate_below_five_in_n():
    assert allowed_rates([0.001, 0.01, 0.05], 600) == [0.01, 0.05]
    assert allowed_rates([0.01], 500) == [0.01]


def test_same_image_counts_noises_that_were_copies_and_their_chance():
    reference_group = np.array([5, 5, 7, 7, 1, 2])
    reference_copy = np.array([True, True, True, False, False, False])
    group = np.array([5, 3, 7, 5, 7, 5])
    labels = np.array([0, 0, 1, 0, 1, 1])
    found = {
        one.metric: one
        for one in same_image_metrics(
            "amg", "unguided", group, reference_group, reference_copy, labels
        )
    }
    assert found["same_image"].value == pytest.approx(2 / 3)
    assert found["same_image"].count == 3
    # Noise 0: others of class 0 are 1 and 3, one of them at 5; noise 1: 0 and 3, both at 5;
    # noise 2: 4 and 5 of class 1, one of them at 7.
    assert found["same_image_chance"].value == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    none = np.zeros(6, dtype=bool)
    args = ("amg", "unguided", group, reference_group, none, labels)
    assert same_image_metrics(*args) == []
