"""The classifier is chosen on the fit images alone and judges what it is shown."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from memfree.evaluation.agreement import ClassJudge
from memfree.evaluation.metrics import HELDOUT


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.data[order] / 8 - 1, data.target[order]


def test_digits_are_recognised(digits):
    pixels, labels = digits
    judge = ClassJudge.fit({"pixels": pixels[:200]}, labels[:200], seed=0)
    agrees = judge.agrees({"pixels": pixels[200:]}, labels[200:])
    ceiling = judge.metric(HELDOUT, agrees)
    assert ceiling.value == agrees.mean() > 0.85
    assert "ceiling" in ceiling.detail["meaning"]
    assert ceiling.low < ceiling.value < ceiling.high
    wrong = judge.agrees({"pixels": pixels[200:]}, (labels[200:] + 1) % 10)
    assert wrong.mean() < 0.1


def test_useless_features_are_not_chosen(digits):
    pixels, labels = digits
    noise = np.random.default_rng(0).normal(size=(200, 20))
    judge = ClassJudge.fit({"efficientnet": noise, "pixels": pixels[:200]}, labels[:200], seed=0)
    assert judge.features == "pixels"
    assert judge.cross_validated > 0.8


def test_a_class_of_one_image_is_refused(digits):
    pixels, _ = digits
    with pytest.raises(ValueError, match="two fit images each"):
        ClassJudge.fit({"pixels": pixels[:3]}, np.array([0, 0, 1]), seed=0)
