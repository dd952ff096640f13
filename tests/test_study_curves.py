"""The logistic fit against scikit-learn and a numeric Hessian, and EMM by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from memfree.study.capacity import effective_memorization
from memfree.study.logistic import Point, fit_logistic


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


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_intervals_are_those_of_the_numeric_hessian_and_pearsons_dispersion(spread):
    points = made(0.9, 30, spread=spread)
    best = minimize(
        likelihood,
        [0, 0],
        args=(points,),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-10, "maxiter": 10_000},
    ).x
    step = 1e-3
    hessian = np.empty((2, 2))
    for i in range(2):
        for j in range(2):
            a, b = np.eye(2)[i] * step, np.eye(2)[j] * step
            hessian[i, j] = (
                likelihood(best + a + b, points)
                - likelihood(best + a - b, points)
                - likelihood(best - a + b, points)
                + likelihood(best - a - b, points)
            ) / (4 * step**2)
    pearson = 0.0
    for point in points:
        p = 1 / (1 + math.exp(-best[0] - best[1] * math.log2(point.factor)))
        pearson += (point.copies - point.count * p) ** 2 / (point.count * p * (1 - p))
    dispersion = max(1.0, pearson / (len(points) - 2))
    covariance = np.linalg.inv(hessian) * dispersion
    t = stats.t.ppf(0.975, len(points) - 2)
    found = fit_logistic(points)
    assert found.dispersion == pytest.approx(dispersion, rel=1e-4)
    assert found.dispersion > 5 if spread else found.dispersion < 3
    half = t * math.sqrt(covariance[1, 1])
    assert found.slope.low == pytest.approx(best[1] - half, rel=1e-3)
    assert found.slope.high == pytest.approx(best[1] + half, rel=1e-3)
    # Delta method by differences.
    middle = lambda beta: -beta[0] / beta[1]  # noqa: E731
    gradient = [(middle(best + d) - middle(best - d)) / (2 * step) for d in np.eye(2) * step]
    half = t * math.sqrt(np.array(gradient) @ covariance @ np.array(gradient))
    assert math.log2(found.midpoint.high) == pytest.approx(middle(best) + half, rel=1e-3)
    assert math.log2(found.midpoint.low) == pytest.approx(middle(best) - half, rel=1e-3)


def test_true_parameters_lie_in_the_intervals():
    found = fit_logistic(made(0.9, 30, seeds=20))
    assert found.slope.low < 0.9 < found.slope.high
    assert found.midpoint.low < 30 < found.midpoint.high


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
def test_a_flat_curve_has_a_slope_about_zero_and_no_midpoint(factors, copies):
    """What a mitigation that works leaves: its slope's interval is the result."""
    points = [Point(f, c, 1000) for f, c in zip(factors, copies, strict=True)]
    best = minimize(likelihood, [-4.0, 0.0], args=(points,), method="BFGS", tol=1e-12)
    found = fit_logistic(points)
    assert (found.intercept, found.slope.value) == pytest.approx(tuple(best.x), abs=1e-5)
    assert found.slope.low < 0 < found.slope.high < 1
    assert found.midpoint is None
    each = np.array(copies) / 1000
    low, high = found.band(np.array(factors))
    rate = found.rate(np.array(factors))
    assert np.all(low < rate) and np.all(rate < high)
    assert np.all(low < each) and np.all(each < high)


def test_the_band_is_what_draws_of_the_parameters_give():
    found = fit_logistic(made(0.9, 30, seeds=20))
    draws = np.random.default_rng(1).multivariate_normal(
        [found.intercept, found.slope.value], found.covariance, 200_000
    )
    factors = np.array([1.0, 20.0, 256.0])
    logits = draws[:, :1] + draws[:, 1:] * np.log2(factors)
    spread = logits.std(0) * found.quantile
    middle = found.intercept + found.slope.value * np.log2(factors)
    low, high = found.band(factors)
    assert np.log(low / (1 - low)) == pytest.approx(middle - spread, abs=1e-2)
    assert np.log(high / (1 - high)) == pytest.approx(middle + spread, abs=1e-2)


def test_two_points_are_met_exactly():
    found = fit_logistic([Point(2, 20, 100), Point(8, 80, 100)])
    assert found.rate(np.array([2, 8])) == pytest.approx([0.2, 0.8])
    assert found.midpoint.value == pytest.approx(4)
    assert found.dispersion == 1.0


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
