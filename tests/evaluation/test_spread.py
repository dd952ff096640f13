"""Precision, recall, Vendi score and diversity against their definitions in plain loops."""

import numpy as np
import pytest
from scipy.linalg import eigh

from memfree.evaluation.metrics import HELDOUT, MetricTable
from memfree.evaluation.quality import (
    Sides,
    diversity_metrics,
    manifold_metrics,
    on_manifold,
    pairwise_diversity,
    vendi_score,
)


def by_loops(points, features, k):
    """Kynkäänniemi et al. 2019, eq. 1, point by point."""
    inside = []
    for point in points:
        found = False
        for i, feature in enumerate(features):
            others = [np.linalg.norm(feature - f) for j, f in enumerate(features) if j != i]
            found |= np.linalg.norm(point - feature) <= sorted(others)[k - 1]
        inside.append(found)
    return np.array(inside)


@pytest.mark.parametrize("k", [1, 3])
def test_manifold_is_its_definition(k, monkeypatch):
    from memfree.evaluation import quality

    monkeypatch.setattr(quality, "_BLOCK", 7)
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(25, 3)), generator.normal(size=(30, 3)) + 1
    assert (on_manifold(fake, real, k) == by_loops(fake, real, k)).all()
    assert 0 < on_manifold(fake, real, k).mean() < 1


def test_too_few_images_for_a_manifold():
    with pytest.raises(ValueError, match="more than 3 images"):
        on_manifold(np.zeros((2, 2)), np.zeros((3, 2)))


def test_precision_and_recall_of_lost_modes_and_of_noise():
    generator = np.random.default_rng(1)
    centres = np.array([[0.0, 0], [50, 0]])
    real = centres[np.arange(100) % 2] + generator.normal(size=(100, 2))
    one_mode = generator.normal(size=(100, 2))
    far = generator.normal(size=(100, 2)) + 500
    sides = Sides("x", {"mode": one_mode, "far": far}, real[::-1], real, seed=0)
    metrics = manifold_metrics(sides)
    table = MetricTable(metrics)
    assert table.get("precision_x", "mode").value > 0.9
    assert 0.4 < table.get("recall_x", "mode").value <= 0.5
    assert table.get("precision_x", "far").value == table.get("recall_x", "far").value == 0
    assert table.get("recall_x", HELDOUT).value == 1
    assert table.get("precision_x", "far").detail["neighbours"] == 3


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_vendi_score_is_its_definition(shape):
    values = np.random.default_rng(2).normal(size=shape)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    n = len(unit)
    kernel = np.array([[float(a @ b) for b in unit] for a in unit])
    spectrum = eigh(kernel / n, eigvals_only=True)
    entropy = -sum(value * np.log(value) for value in spectrum if value > 1e-12)
    assert vendi_score(unit) == pytest.approx(np.exp(entropy), rel=1e-9)


def test_vendi_score_counts_what_differs():
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3)
    assert vendi_score(np.tile([1.0, 0, 0], (5, 1))) == pytest.approx(1)


def test_pairwise_diversity_is_the_mean_over_pairs():
    values = np.random.default_rng(3).normal(size=(9, 4))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(9) for j in range(9) if i != j]
    assert pairwise_diversity(unit) == pytest.approx(np.mean(pairs))


def test_diversity_has_equal_counts_and_an_interval_around_the_value():
    generator = np.random.default_rng(4)
    wide, narrow = generator.normal(size=(80, 6)), generator.normal(size=(60, 6)) + 3
    table = MetricTable(diversity_metrics("x", {"wide": wide, "narrow": narrow}, seed=0))
    for name in ("vendi_x", "diversity_x"):
        one, other = table.get(name, "wide"), table.get(name, "narrow")
        assert one.count == other.count == 60
        assert one.low < one.value < one.high and one.low > other.high
    assert diversity_metrics("x", {"w": wide}, 0) == diversity_metrics("x", {"w": wide}, 0)
