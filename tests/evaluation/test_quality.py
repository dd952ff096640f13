"""Fréchet distance and KID against their definitions in float64."""

import numpy as np
import pytest
from scipy import linalg

from memfree.evaluation.metrics import HELDOUT, MetricTable
from memfree.evaluation.quality import FrechetDistance, Sides, frechet_metrics, kid_metrics


def by_definition(a, b):
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), with scipy's matrix square root."""
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    traces = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces)


@pytest.fixture
def clouds():
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(6, 6))
    return {
        "near": generator.normal(size=(150, 6)) @ mix,
        "far": generator.normal(size=(150, 6)) @ mix + 2,
        "train": generator.normal(size=(120, 6)) @ mix,
        "test": generator.normal(size=(100, 6)) @ mix,
    }


def test_frechet_distance_is_its_definition(clouds):
    expected = by_definition(clouds["far"], clouds["test"])
    assert FrechetDistance(clouds["test"])(clouds["far"]) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_features():
    # Constant pixels, as the corners of digits are, must not upset the matrix square root.
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(50, 4)), generator.normal(size=(60, 4)) + 1
    padded = [np.hstack([part, np.full((len(part), 3), -1.0)]) for part in (a, b)]
    assert FrechetDistance(padded[1])(padded[0]) == pytest.approx(by_definition(a, b), rel=1e-5)


def test_equal_counts_floor_and_pairs(clouds):
    subjects = {"unguided": clouds["far"], "amg": clouds["near"]}
    sides = Sides("x", subjects, clouds["train"], clouds["test"], 0)
    metrics = frechet_metrics(sides, {"amg": "unguided"}, draws=40)
    table = MetricTable(metrics)
    assert {one.count for one in metrics} == {100}
    far, near = table.get("frechet_x", "unguided"), table.get("frechet_x", "amg")
    floor = table.get("frechet_x", HELDOUT)
    assert far.value > 5 * near.value
    assert floor.detail["compared"] == "distinct training images"
    assert near.low < near.value < near.high
    difference = table.get("frechet_x_difference", "amg")
    assert difference.value == pytest.approx(near.value - far.value)
    assert difference.high < 0


def test_a_pair_that_differs_in_nothing_has_no_difference(clouds):
    subjects = {"unguided": clouds["near"], "amg": clouds["near"].copy()}
    pairs = {"amg": "unguided"}
    sides = Sides("x", subjects, clouds["train"], clouds["test"], 0)
    metrics = frechet_metrics(sides, pairs, draws=5)
    difference = MetricTable(metrics).get("frechet_x_difference", "amg")
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_frechet_interval_covers_other_samples_of_the_same_size():
    generator = np.random.default_rng(3)
    target = generator.normal(size=(200, 5))
    inside = 0
    for seed in range(12):
        subject = {"x": generator.normal(size=(400, 5)) + 0.3}
        found = frechet_metrics(Sides("f", subject, target, target, seed), draws=40)[0]
        other = FrechetDistance(target)(generator.normal(size=(200, 5)) + 0.3)
        inside += found.low <= other <= found.high
    assert inside >= 9


def test_frechet_metrics_repeat_with_their_seed(clouds):
    def once():
        subjects = {"x": clouds["near"]}
        sides = Sides("f", subjects, clouds["train"], clouds["test"], 5)
        return frechet_metrics(sides, draws=10)

    assert once() == once()


def kernel_distance(a, b):
    """Unbiased squared MMD with the cubic kernel (x·y/D + 1)³, in plain loops over matrices."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = sum(
        (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (a, b)
    )
    return within - 2 * kernel(a, b).mean()


def test_kid_is_its_definition(clouds):
    subjects = {"far": clouds["far"], "near": clouds["near"]}
    sides = Sides("x", subjects, clouds["train"], clouds["test"], 0)
    table = MetricTable(kid_metrics(sides, subsets=100))
    far = table.get("kid_x", "far")
    expected = kernel_distance(clouds["far"], clouds["test"])
    assert far.value == pytest.approx(expected, rel=0.15)
    assert abs(table.get("kid_x", "near").value) < 0.1 * far.value
    assert far.detail["subset"] == 50


def test_kid_leaves_the_global_generator_alone(clouds):
    import torch

    before = torch.get_rng_state()
    kid_metrics(Sides("x", {"near": clouds["near"]}, clouds["train"], clouds["test"], 0), 2)
    assert torch.equal(before, torch.get_rng_state())
