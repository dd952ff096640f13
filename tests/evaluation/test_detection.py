"""ROC curves and AUC against counting pairs by hand."""

import numpy as np
import pytest

from memfree.evaluation.detectors import auc_difference, detector
from memfree.evaluation.intervals import resampled


def made(seed=0, n=60):
    generator = np.random.default_rng(seed)
    copies = generator.random(n) < 0.4
    good = copies * 1.5 + generator.normal(size=n)
    rounded = np.round(copies * 0.5 + generator.normal(size=n), 1)  # with ties
    return good, rounded, copies


@pytest.mark.parametrize("which", [0, 1])
def test_auc_is_the_share_of_pairs_in_order(which):
    scores, copies = made()[which], made()[2]
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[copies] for b in scores[~copies]]
    found = detector(scores, copies)
    assert found.auc.value == pytest.approx(np.mean(pairs))
    assert found.auc.low < found.auc.value < found.auc.high
    assert (found.copies, found.others) == (copies.sum(), (~copies).sum())


def test_the_curve_counts_what_is_at_or_above_each_threshold():
    scores, copies = made()[1:]
    roc = detector(scores, copies, draws=10).roc.to_pylist()
    assert roc[0] == {
        "threshold": np.inf,
        "false_positive_rate": 0,
        "true_positive_rate": 0,
    }
    for row in roc:
        called = scores >= row["threshold"]
        assert row["true_positive_rate"] == pytest.approx(called[copies].mean())
        assert row["false_positive_rate"] == pytest.approx(called[~copies].mean())
    area = np.trapezoid(
        [row["true_positive_rate"] for row in roc], [row["false_positive_rate"] for row in roc]
    )
    assert area == pytest.approx(detector(scores, copies, draws=10).auc.value)


def test_the_true_positive_rate_at_a_false_positive_rate():
    scores, copies = made()[::2]
    found = detector(scores, copies, draws=10)
    for rate in (0.0, 0.05, 0.2):
        allowed = np.sort(scores[~copies])[::-1][int(rate * (~copies).sum())]
        assert found.true_positive_rate(rate) == pytest.approx((scores[copies] > allowed).mean())


def test_a_perfect_and_a_useless_detector():
    copies = np.arange(40) < 20
    assert detector(copies * 1.0, copies, draws=10).auc.value == 1
    assert detector(-1.0 * copies, copies, draws=10).auc.value == 0
    assert detector(np.zeros(40), copies, draws=10).auc.value == 0.5


def test_two_detectors_are_compared_on_the_same_resamples():
    good, rounded, copies = made(n=200)
    difference = auc_difference(good, rounded, copies, draws=200)
    expected = detector(good, copies, draws=1).auc.value
    expected -= detector(rounded, copies, draws=1).auc.value
    assert difference.value == pytest.approx(expected) and difference.low > 0
    same = auc_difference(good, good, copies, draws=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(85), 10)])
def test_few_copies_among_many_have_an_interval_of_numbers(clusters):
    """With ten copies among 850 one resample in twenty thousand has none; with so many, some do."""
    generator = np.random.default_rng(0)
    copies = np.arange(850) % 85 == 0
    found = detector(copies + generator.normal(size=850), copies, draws=1000, clusters=clusters)
    assert 0 < found.auc.low < found.auc.value < found.auc.high < 1


def test_a_resample_without_a_copy_is_drawn_again():
    values = resampled(6, lambda rows: 1.0 if 0 in rows else float("nan"), seed=0, draws=200)
    assert values.tolist() == [1.0] * 200
    assert not len(resampled(6, lambda rows: float("nan"), seed=0, draws=5))


def test_copies_of_few_conditions_have_no_interval():
    copies = np.arange(100) < 20
    clusters = np.arange(100) // 10
    found = detector(np.arange(100.0), copies, clusters=clusters)
    assert (found.auc.low, found.auc.high) == (None, None)
    with pytest.raises(ValueError, match="5 conditions with copies"):
        auc_difference(np.arange(100.0), np.arange(100.0), copies, clusters=clusters)


def test_few_samples_have_no_interval():
    copies = np.arange(30) < 5
    found = detector(np.arange(30.0), copies)
    assert (found.auc.low, found.auc.high) == (None, None)
    with pytest.raises(ValueError, match="at least 10 copies"):
        auc_difference(np.arange(30.0), np.arange(30.0), copies)


@pytest.mark.parametrize(
    ("scores", "copies", "said"),
    [
        (np.ones(3), np.ones(4, dtype=bool), "scores for"),
        (np.array([1.0, np.nan]), np.array([True, False]), "NaN"),
        (np.ones(3), np.ones(3, dtype=bool), "needs copies and other samples"),
    ],
)
def test_bad_input_is_refused(scores, copies, said):
    with pytest.raises(ValueError, match=said):
        detector(scores, copies)
