"""Intervals against closed forms written another way, and against their own coverage."""

import numpy as np
import pytest
from scipy import optimize, stats

from memfree.evaluation.intervals import bootstrap, paired_rate_difference, weighted_rate, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (617, 1300), (10, 10), (1, 500)])
def test_wilson_bounds_solve_the_score_equation(successes, n):
    # Wilson's bounds are the rates p at which |p̂ − p| = z·sqrt(p(1−p)/n): solve it numerically.
    z = stats.norm.ppf(0.975)
    rate = successes / n

    def score(p):
        return abs(rate - p) - z * np.sqrt(p * (1 - p) / n)

    low = 0.0 if successes == 0 else optimize.brentq(score, 1e-12, rate * (1 - 1e-9))
    high = 1.0 if successes == n else optimize.brentq(score, rate + 1e-9, 1 - 1e-12)
    found = wilson(successes, n)
    assert (found.value, found.low, found.high) == pytest.approx((rate, low, high), abs=1e-9)


def test_wilson_agrees_with_scipy():
    reference = stats.binomtest(7, 120).proportion_ci(0.9, method="wilson")
    found = wilson(7, 120, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_rate(successes, n):
    with pytest.raises(ValueError, match="a rate needs"):
        wilson(successes, n)


def test_equal_weights_are_plain_wilson():
    flags = np.array([True] * 4 + [False] * 36)
    found, plain = weighted_rate(flags, np.full(40, 0.3)), wilson(4, 40)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_unequal_weights_shrink_the_effective_size():
    flags = np.array([True, False, False, False])
    weights = np.array([3.0, 1, 1, 1])
    found = weighted_rate(flags, weights)
    effective = 6**2 / (9 + 3)
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(wilson(0.5 * effective, effective).low)


def test_paired_difference_of_two_zero_rates_has_a_width():
    zeros = np.zeros(1300, bool)
    found = paired_rate_difference(zeros, zeros)
    assert found.value == 0
    assert found.low < 0 < found.high < 0.005


def test_paired_difference_covers_the_truth():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        shared = generator.random(200) < 0.1
        a = shared | (generator.random(200) < 0.05)
        b = shared | (generator.random(200) < 0.3)
        truth = (1 - 0.9 * 0.95) - (1 - 0.9 * 0.7)
        found = paired_rate_difference(a, b)
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_pairing_narrows_the_difference():
    generator = np.random.default_rng(1)
    a = generator.random(500) < 0.4
    b = a.copy()
    b[:10] = ~b[:10]
    paired = paired_rate_difference(a, b)
    shuffled = paired_rate_difference(a, generator.permutation(b))
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(2).normal(size=400)
    found = bootstrap(400, lambda rows: float(values[rows].mean()), seed=0, draws=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)
