"""The logistic fit against scikit-learn and a numeric Hessian, and EMM by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from memfree.study.summary import Capacities, Point, effective_memorization, fit_logistic


def made(slope, midpoint, seeds=3, count=400, spread=0.0):
    generator = np.random.default_rng(0)
    points = []
    for _ in range(seeds):
        for factor in (1, 4, 16, 64, 256):
            logit = slope * (math.log2(factor) - math.log2(midpoint)) + spread * generator.normal()
            copies = generator.binomial(count, 1 / (1 + math.exp(-logit)))
            points.append(Point(factor, int(copies), count))
    return points


def likelihood(beta, points):
    total = 0.0
    for point in points:
        logit = beta[0] + beta[1] * math.log2(point.factor)
        total += point.count * np.logaddexp(0, logit) - point.copies * logit
    return total


def test_the_fit_is_that_of_logistic_regression():
    points = made(0.9, 30)
    x, y, weights = [], [], []
    for point in points:
        x += [[math.log2(point.factor)]] * 2
        y += [1, 0]
        weights += [point.copies, point.count - point.copies]
    other = LogisticRegression(C=1e12, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=weights)
    found = fit_logistic(points)
    assert found.slope.value == pytest.approx(other.coef_[0, 0], rel=1e-5)
    middle = 2 ** (-other.intercept_[0] / other.coef_[0, 0])
    assert found.midpoint.value == pytest.approx(middle, rel=1e-5)
    probability = other.predict_proba([[math.log2(8)]])[0, 1]
    assert found.rate(np.array([8.0]))[0] == pytest.approx(probability, rel=1e-5)


def ladder(generator, seeds=3, slope=1.6, midpoint=35, count=400):
    """Factors of each seed share one training, which moves its whole curve."""
    points = []
    for seed in range(seeds):
        moved, steeper = 0.25 * generator.normal(), 0.15 * generator.normal()
        for factor in (1, 4, 16, 64, 256):
            dose = math.log2(factor) - math.log2(midpoint) - moved
            copies = generator.binomial(count, 1 / (1 + math.exp(-(slope + steeper) * dose)))
            points.append(Point(factor, int(copies), count, seed))
    return points


def test_each_seed_is_fitted_and_students_t_says_how_sure_the_mean_is():
    points = ladder(np.random.default_rng(0))
    each = [fit_logistic([p for p in points if p.seed == seed]) for seed in range(3)]
    slopes = [fit.slope.value for fit in each]
    middles = [math.log2(fit.midpoint.value) for fit in each]
    found = fit_logistic(points)
    for interval, values in ((found.slope, slopes), (found.midpoint, middles)):
        ends = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        if interval is found.midpoint:
            ends, values = np.exp2(ends), [2 ** np.mean(values)]
        assert interval.value == pytest.approx(np.mean(values))
        assert (interval.low, interval.high) == pytest.approx(tuple(ends))


def test_one_seed_has_a_curve_and_no_interval():
    found = fit_logistic(made(0.9, 30))
    assert found.slope.low is None and found.midpoint.low is None
    assert found.band(np.array([1.0, 16.0])) is None


def test_intervals_cover_other_trainings():
    generator = np.random.default_rng(1)
    inside = np.zeros(2)
    for _ in range(200):
        found = fit_logistic(ladder(generator))
        inside += found.slope.low <= 1.6 <= found.slope.high
        inside[1] += found.midpoint.low <= 35 <= found.midpoint.high
        inside[1] -= found.slope.low <= 1.6 <= found.slope.high
    assert (inside / 200 >= 0.9).all()


def test_a_seed_without_a_fit_leaves_no_curve_of_the_others():
    points = ladder(np.random.default_rng(0))
    assert fit_logistic([*points, Point(1, 0, 10, 9), Point(4, 10, 10, 9)]) is None


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(4, 3, 10), Point(4, 5, 10)],
        [Point(1, 0, 10), Point(4, 0, 10)],
        [Point(1, 10, 10), Point(4, 10, 10)],
        [Point(1, 0, 10), Point(4, 10, 10)],
        [Point(1, 0, 10), Point(4, 0, 0), Point(8, 0, 5)],
    ],
)
def test_no_curve_where_none_fits_best(points):
    assert fit_logistic(points) is None


@pytest.mark.parametrize(
    ("factors", "copies"),
    [((1, 256), (10, 10)), ((1, 16, 256), (10, 11, 12)), ((1, 4, 16, 64), (12, 8, 13, 9))],
)
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_flat_curve_has_a_slope_about_zero_and_no_midpoint(factors, copies, seeds):
    """What a mitigation that works leaves: its slope's interval is the result."""
    first = [Point(f, c, 1000) for f, c in zip(factors, copies, strict=True)]
    best = minimize(likelihood, [-4.0, 0.0], args=(first,), method="BFGS", tol=1e-12)
    found = fit_logistic(first)
    assert (found.intercept, found.slope.value) == pytest.approx(tuple(best.x), abs=1e-5)
    points = [
        Point(f, c + (seed - 1 if place else 1 - seed), 1000, seed)
        for seed in range(seeds)
        for place, (f, c) in enumerate(zip(factors, copies, strict=True))
    ]
    found = fit_logistic(points)
    assert found.midpoint is None
    if seeds > 1:
        assert found.slope.low < 0 < found.slope.high < 1


def test_the_band_is_students_interval_of_the_seeds_logits():
    found = fit_logistic(ladder(np.random.default_rng(2)))
    logits = found.curves[:, :1] + found.curves[:, 1:] * np.log2([1.0, 20.0, 256.0])
    ends = stats.t.interval(0.95, 2, logits.mean(0), stats.sem(logits))
    low, high = found.band(np.array([1.0, 20.0, 256.0]))
    assert np.log(low / (1 - low)) == pytest.approx(ends[0])
    assert np.log(high / (1 - high)) == pytest.approx(ends[1])


def test_two_points_are_met_exactly():
    found = fit_logistic([Point(2, 20, 100), Point(8, 80, 100)])
    assert found.rate(np.array([2, 8])) == pytest.approx([0.2, 0.8])
    assert found.midpoint.value == pytest.approx(4)


def test_effective_memorization_by_hand():
    found = effective_memorization({8: 1.0, 16: 0.95, 32: 0.85, 64: 0.1})
    assert (found.largest, found.text) == (16, "16")
    assert found.crossing == pytest.approx(2 ** (4 + 0.5))
    assert effective_memorization({64: 0.2, 32: 0.9}).largest == 32, "at least 90 %"
    assert effective_memorization({8: 0.89, 16: 0.5}).text == "below 8"
    assert effective_memorization({8: 0.89, 16: 0.5}).crossing is None
    assert effective_memorization({8: 1.0, 16: 0.91}).text == "at least 16"
    # The largest, even where a smaller set misses it.
    assert effective_memorization({8: 0.8, 16: 0.92, 32: 0.3}).largest == 16


def test_effective_memorization_is_that_of_each_seed():
    """The mean share would be at least 90 % at 32 images, where one seed of three has it."""
    rates = [{16: 1.0, 32: 0.99, 64: 0.2}, {16: 1.0, 32: 0.86, 64: 0.1}, {16: 1.0, 32: 0.85, 64: 0}]
    each = {seed: effective_memorization(known) for seed, known in enumerate(rates)}
    found = Capacities(each)
    assert found.text == "32, 16, 16"
    logs = [math.log2(capacity.crossing) for capacity in each.values()]
    ends = stats.t.interval(0.95, 2, np.mean(logs), stats.sem(logs))
    assert found.crossing.value == pytest.approx(2 ** np.mean(logs))
    assert (found.crossing.low, found.crossing.high) == pytest.approx(tuple(np.exp2(ends)))
    assert Capacities({0: each[0]}).crossing.low is None
    beyond = effective_memorization({16: 1.0, 32: 0.95})
    assert Capacities({0: each[0], 1: beyond}).crossing is None
