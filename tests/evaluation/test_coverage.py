"""Do nominal 95 % intervals hold the truth in at least 90 % of simulations, and at what width?

Samples depend on each other as the product's do: ten captions of fifty samples each, that copy or
do not; the same noise with and without guidance; the same test images for everyone.
"""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from memfree.evaluation.detectors import auc_difference, detector
from memfree.evaluation.intervals import (
    mean_interval,
    paired_rate_difference,
    quantile_interval,
    rate_interval,
    rate_ratio,
    shared_conditions,
    weighted_rate,
    wilson,
)
from memfree.evaluation.quality import (
    FrechetDistance,
    Sides,
    frechet_metrics,
    kid_metrics,
    pairwise_diversity,
    subsample,
)

CAPTIONS, EACH = 10, 50
TEN = np.repeat(np.arange(CAPTIONS), EACH)


def caption_rates(generator, mean, correlation):
    precision = 1 / correlation - 1
    return generator.beta(mean * precision, (1 - mean) * precision, CAPTIONS)


def coverage(simulate, times):
    """Share of intervals that hold the truth; ``simulate`` returns (interval, truth)."""
    pairs = [simulate() for _ in range(times)]
    return np.mean([found.low <= truth <= found.high for found, truth in pairs])


@pytest.mark.parametrize(
    ("mean", "correlation"), [(0.02, 0.1), (0.05, 0.7), (0.3, 0.05), (0.3, 0.3), (0.87, 0.4)]
)
def test_rates_cover_other_captions(mean, correlation):
    generator = np.random.default_rng(0)

    def simulate(clusters=TEN):
        flags = generator.random(len(TEN)) < caption_rates(generator, mean, correlation)[TEN]
        return rate_interval(flags, clusters), mean

    assert coverage(simulate, 150) >= 0.9
    assert coverage(lambda: simulate(None), 150) < 0.87, "by samples it does not"


def test_no_copy_of_ten_captions_says_less_than_none_of_500():
    none, one = np.zeros(500, bool), np.arange(500) < 1
    found = rate_interval(none, TEN)
    assert (found.value, found.low) == (0, 0)
    assert wilson(0, 500).high < found.high < wilson(0, 10).high
    assert found.high < rate_interval(one, TEN).high, "one copy is more than none"
    full = rate_interval(~none, TEN)
    assert (full.high, full.low) == pytest.approx((1, 1 - found.high), abs=1e-6)


@pytest.mark.parametrize(
    ("means", "correlation"), [((0.8, 0.05), 0.3), ((0.3, 0.25), 0.3), ((0.02, 0.02), 0.1)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_paired_differences_cover_other_captions(means, correlation, shared):
    """``shared``: what one subject copies, the other is likely to; else captions differ freely."""
    generator = np.random.default_rng(1)
    precision = 1 / correlation - 1

    def simulate():
        place = generator.random((2, CAPTIONS))
        place[1] = place[0] if shared else place[1]
        noise = generator.random(len(TEN))
        flags = [
            noise < stats.beta.ppf(q, mean * precision, (1 - mean) * precision)[TEN]
            for q, mean in zip(place, means, strict=True)
        ]
        return paired_rate_difference(*flags, clusters=TEN), means[0] - means[1]

    assert coverage(simulate, 100) >= 0.9


@pytest.mark.parametrize(
    ("mean", "correlation", "floor"),
    [(0.3, 0.2, 0.04), (0.05, 0.2, 0.02), (0.3, None, 0.01), (0.02, None, 0.04)],
)
def test_ratios_to_a_rare_fair_share_cover(mean, correlation, floor):
    generator = np.random.default_rng(2)

    def simulate():
        base = generator.random(250) < floor
        while not base.any():  # no ratio is given
            base = generator.random(250) < floor
        rates = np.full(CAPTIONS, mean)
        if correlation:
            rates = caption_rates(generator, mean, correlation)
        flags = generator.random(len(TEN)) < rates[TEN]
        seed = int(generator.integers(1 << 31))
        clusters = TEN if correlation else None
        return rate_ratio(flags, base, np.ones(250), seed, clusters, draws=500), mean / floor

    assert coverage(simulate, 150) >= 0.9


def test_weighted_rates_cover():
    generator = np.random.default_rng(3)
    weights = np.where(np.arange(200) < 100, 3.0, 0.5)
    truth = (100 * 3 * 0.1 + 100 * 0.5 * 0.3) / weights.sum()

    def simulate():
        flags = generator.random(200) < np.where(np.arange(200) < 100, 0.1, 0.3)
        return weighted_rate(flags, weights), truth

    assert 0.9 <= coverage(simulate, 400) <= 0.99


@pytest.mark.parametrize(("captions", "each"), [(10, 50), (40, 3), (200, 1)])
def test_means_cover_other_captions(captions, each):
    generator, clusters = np.random.default_rng(4), np.repeat(np.arange(captions), each)

    def simulate():
        own = generator.normal(size=captions)[clusters]
        return mean_interval(
            own + generator.normal(size=len(clusters)) + 3, shared_conditions(clusters)
        ), 3

    assert 0.92 <= coverage(simulate, 400) <= 0.98


@pytest.mark.parametrize(("captions", "each"), [(10, 50), (400, 1)])
def test_quantiles_cover_other_captions(captions, each):
    generator, clusters = np.random.default_rng(5), np.repeat(np.arange(captions), each)
    truth = stats.norm.ppf(0.05, 3, np.sqrt(1.25))

    def simulate():
        values = generator.normal(3, 0.5, captions)[clusters] + generator.normal(
            size=captions * each
        )
        return quantile_interval(values, 0.05, shared_conditions(clusters)), truth

    assert coverage(simulate, 60 if each > 1 else 300) >= 0.9


@pytest.mark.parametrize("count", [1, 2, 5, 20, 60, 90])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_quantiles_of_few_values_cover(count, share):
    """The smallest of ten values is above the 5 % quantile more often than not."""
    generator, truth = np.random.default_rng(12), stats.expon.ppf(share)

    def simulate():
        return quantile_interval(generator.exponential(size=count), share, at_least=0.0), truth

    assert coverage(simulate, 200) >= 0.9
    found = simulate()[0]
    assert (found.low == 0) == (count < (74 if share == 0.05 else 4))
    assert np.isinf(found.high) == (share == 0.5 and count < 4)


@pytest.mark.parametrize("captions", [2, 3, 4])
def test_paired_differences_of_few_captions_cover(captions):
    """Two captions always seem to correlate fully."""
    generator, clusters = np.random.default_rng(13), np.repeat(np.arange(captions), EACH)

    def simulate():
        place, noise = generator.random(captions), generator.random(captions * EACH)
        flags = [
            noise < stats.beta.ppf(place, mean * 7 / 3, (1 - mean) * 7 / 3)[clusters]
            for mean in (0.6, 0.1)
        ]
        return paired_rate_difference(*flags, clusters=clusters), 0.5

    assert coverage(simulate, 150) >= 0.9


def test_resamples_that_all_say_the_same_give_no_interval():
    copies = np.arange(60) < 20
    apart, other = 9.0 * copies + np.random.default_rng(14).normal(size=(2, 60)) / 9
    assert auc_difference(apart, other, copies).low is None
    assert auc_difference(apart, 2 * apart, copies).low == 0, "the same ranks"
    assert detector(apart, copies).auc.low < 1


ALONE = 350
ALL = np.concatenate([TEN, CAPTIONS + np.arange(ALONE)])


def text_study_scores(generator, captions=CAPTIONS, alone=ALONE):
    """Ten captions are copied, each with a score of its own level; others hardly ever are."""
    rates = np.concatenate([generator.beta(3.5, 0.5, captions).repeat(EACH), np.full(alone, 0.03)])
    levels = 0.8 * np.concatenate(
        [generator.normal(size=captions).repeat(EACH), generator.normal(size=alone)]
    )
    copies = generator.random(len(rates)) < rates
    scores = 1.2 * copies + levels + generator.normal(size=len(rates))
    return scores, scores + generator.normal(size=len(rates)), copies


def test_auc_covers_other_captions():
    generator = np.random.default_rng(6)
    good, worse, copies = text_study_scores(generator, 4000, 4000 * ALONE // CAPTIONS)
    truth = roc_auc_score(copies, good)
    difference = truth - roc_auc_score(copies, worse)

    def simulate(clusters=ALL):
        scores, _, copies = text_study_scores(generator)
        return detector(scores, copies, draws=150, clusters=clusters).auc, truth

    def compare():
        scores, others, copies = text_study_scores(generator)
        return auc_difference(scores, others, copies, draws=150, clusters=ALL), difference

    assert coverage(simulate, 80) >= 0.9
    assert coverage(lambda: simulate(None), 80) < 0.8, "by samples it does not"
    assert coverage(compare, 80) >= 0.9


def test_auc_of_few_copies_covers():
    generator = np.random.default_rng(7)
    truth = stats.norm.cdf(1.5 / np.sqrt(2))

    def simulate():
        copies = np.arange(300) < 15
        return detector(1.5 * copies + generator.normal(size=300), copies, draws=200).auc, truth

    assert coverage(simulate, 300) >= 0.9


@pytest.mark.parametrize(("count", "shift"), [(160, 0.0), (320, 0.3)])
def test_distances_cover_other_samples_and_are_no_wider_than_they_vary(count, shift):
    """Samples are drawn again, as many, and compared with the same 160 test images."""
    generator = np.random.default_rng(8)
    target = generator.normal(size=(160, 8))

    def distance(samples, seed):
        return frechet_metrics(Sides("x", {"x": samples}, target, target, seed), draws=60)[0]

    def kernel(samples, seed):
        return kid_metrics(Sides("x", {"x": samples}, target, target, seed))[0]

    for measure, times in ((distance, 30), (kernel, 80)):
        found = [measure(generator.normal(size=(count, 8)) + shift, seed) for seed in range(times)]
        values = np.array([one.value for one in found])
        inside = np.mean([one.low <= values.mean() <= one.high for one in found])
        assert inside >= 0.9, measure.__name__
        width = np.mean([one.high - one.low for one in found]) / 2 / 1.96
        assert 0.8 <= width / values.std(ddof=1) <= 1.5, measure.__name__


def test_distances_cover_samples_of_other_captions():
    generator = np.random.default_rng(9)
    target, clusters = generator.normal(size=(160, 4)), np.repeat(np.arange(20), 8)
    shared, found = {"x": clusters}, []
    for seed in range(30):
        x = 0.6 * generator.normal(size=(20, 4))[clusters] + 0.5
        x = x + 0.8 * generator.normal(size=(160, 4))
        found.append(
            frechet_metrics(Sides("x", {"x": x}, target, target, seed, shared), draws=60)[0]
        )
    middle = np.mean([one.value for one in found])
    assert np.mean([one.low <= middle <= one.high for one in found]) >= 0.9
    assert found[0].detail["conditions"] == 20


def test_subsets_give_the_variance_of_linear_and_quadratic_statistics():
    """Variances known in closed form: of a mean, σ²/n, and of its square about 0, 2σ⁴/n²."""
    generator = np.random.default_rng(10)
    for power, truth in ((1, 1 / 200), (2, 2 / 200**2)):
        widths = []
        for seed in range(60):
            values = generator.normal(size=200)
            spread = subsample(200, lambda rows, v=values, p=power: v[rows].mean() ** p, seed)
            found = spread.interval(0.0)
            widths.append((found.high - found.low) / 2 / stats.t.ppf(0.975, 199))
        assert 0.9 <= np.sqrt(np.mean(np.square(widths)) / truth) <= 1.6


def test_diversity_covers_other_samples():
    generator = np.random.default_rng(11)

    def measured():
        values = generator.normal(size=(120, 6)) * np.arange(1, 7) + 0.5
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        return unit, pairwise_diversity(unit)

    truth = np.mean([measured()[1] for _ in range(400)])

    def simulate():
        unit, value = measured()
        spread = subsample(120, lambda rows: pairwise_diversity(unit[rows]), 0)
        return spread.interval(value), truth

    assert coverage(simulate, 100) >= 0.9


def test_few_units_have_no_interval():
    assert subsample(7, lambda rows: 1.0, 0).interval(1.0).low is None
    far = FrechetDistance(np.random.default_rng(0).normal(size=(30, 2)))
    alike = np.random.default_rng(1).normal(size=(30, 2))
    three = np.repeat(np.arange(3), 10)
    assert subsample(30, lambda rows: far(alike[rows]), 0, three).interval(1.0).low is None


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (None, None),
        (["a", "b", "c"], None),
        (["a", "a", "a"], None),
        (["b", "a", "b"], [1, 0, 1]),
        (np.array([7, 7, 3]), [1, 1, 0]),
    ],
)
def test_conditions_are_shared_where_several_samples_have_one_of_several(conditions, found):
    shared = shared_conditions(conditions)
    assert shared is None if found is None else shared.tolist() == found
