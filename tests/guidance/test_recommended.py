"""What settings build: the recommended values for pixels and for embeddings, and given ones."""

from dataclasses import fields, replace

import pytest
import torch
from amg_steps import make_images, make_index

from memfree.guidance import (
    AntiMemorizationGuidance,
    EmbeddingSimilarity,
    GuidanceSettings,
    NormalizedL2,
    SteadyAMG,
    ThresholdSchedule,
    calibrate,
)
from memfree.guidance.settings import EMBEDDINGS, EMBEDDINGS_ALONE, PIXELS
from memfree.retrieval import ReferenceIndex
from memfree.retrieval.features.base import Features


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def index(images):
    return make_index(images)


def test_recommended_settings_are_switched_on_and_calibrated(index):
    threshold = calibrate(index, NormalizedL2(), held_out())
    amg = AntiMemorizationGuidance.recommended(index)
    assert amg.threshold(0.0) == pytest.approx(threshold)
    assert amg.threshold(1.0) < threshold
    assert amg.c1 > 0 and amg.c2 > 0 and amg.c3 > 0
    assert amg.gate_margin > 0 and amg.max_displacement is not None
    assert amg.final_correction is not None and amg.final_correction < threshold
    paper = SteadyAMG(index, NormalizedL2(), ThresholdSchedule(-1.95, -1.5), 1, 1, 1)
    assert paper.gate_margin == 0
    assert paper.max_displacement is None and paper.final_correction is None


def test_settings_build_what_they_name(index):
    with pytest.raises(ValueError, match="no calibration"):
        GuidanceSettings(mitigation="amg").build(index)
    calibrate(index, NormalizedL2(), held_out())
    names = {
        mitigation: [type(one).__name__ for one in GuidanceSettings(mitigation).build(index)]
        for mitigation in ("none", "amg", "multiplicity", "both")
    }
    assert names == {
        "none": ["Observer"],
        "amg": ["SteadyAMG"],
        "multiplicity": ["MultiplicityGuidance", "Observer"],
        "both": ["MultiplicityGuidance", "SteadyAMG"],
    }
    constant = GuidanceSettings("amg", schedule="constant").build(index)[0]
    assert constant.threshold(0.0) == constant.threshold(1.0)


class Directions(Features):
    """Pixels of length 1, compared by their cosine."""

    metric = "cosine"

    def forward(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)

    def describe(self):
        return {"name": "directions", "metric": "cosine"}


def held_out():
    return torch.rand(600, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1


@pytest.fixture(params=["pixels", "embeddings"])
def calibrated(request, images):
    """An index, its threshold and what is recommended for it."""
    if request.param == "pixels":
        index, similarity, values = make_index(images), NormalizedL2(), PIXELS
    else:
        index, values = ReferenceIndex.build(images, features=Directions()), EMBEDDINGS_ALONE
        similarity = EmbeddingSimilarity()
    return index, calibrate(index, similarity, held_out()), values


def test_what_is_not_set_is_recommended_by_what_sigma_is_made_of(calibrated):
    index, end, values = calibrated
    unset = {
        one.name
        for one in fields(GuidanceSettings)
        if getattr(GuidanceSettings(), one.name) is None
    }
    assert unset == PIXELS.keys() == EMBEDDINGS.keys()
    assert GuidanceSettings("amg").resolved(None) == GuidanceSettings("amg")
    assert GuidanceSettings("amg").resolved(index) == GuidanceSettings("amg", **values)
    both = PIXELS if index.metric == "l2" else EMBEDDINGS
    assert GuidanceSettings("both").resolved(index) == GuidanceSettings("both", **both)
    amg = GuidanceSettings("amg").anti_memorization(index)
    for name in values.keys() - {"start_ratio"}:
        assert getattr(amg, name) == values[name], name
    # λ starts below its end: a distance's σ is negative, a cosine's positive.
    start = end * values["start_ratio"] if end < 0 else end / values["start_ratio"]
    assert start < end and (end < 0) == (values is PIXELS)
    assert (amg.threshold.start, amg.threshold.end) == pytest.approx((start, end))
    assert amg.final_correction == pytest.approx(end - values["gate_margin"] / 4)
    observer = GuidanceSettings().observer(index)
    assert observer.threshold(0.5) == amg.threshold(0.5)


def test_what_is_set_is_taken_whatever_is_recommended(calibrated):
    index, end, _ = calibrated
    given = {
        "start_ratio": 2.0,
        "gate_margin": 0.0,
        "margin_per_doubling": 0.25,
        "max_displacement": 0.75,
        "least_scale": 0.5,
        "latched": False,
    }
    settings = GuidanceSettings("amg", **given)
    assert settings.resolved(index) == settings
    for latched in (False, True):
        amg = replace(settings, latched=latched).anti_memorization(index)
        assert amg.latched is latched
    for name in given.keys() - {"start_ratio"}:
        assert getattr(amg, name) == {**given, "latched": True}[name], name
    assert amg.threshold.start == pytest.approx(2 * end if end < 0 else end / 2)
    assert replace(settings, max_displacement=0.0).anti_memorization(index).max_displacement is None


def test_multiplicity_guidance_damps_captions_unless_told_not_to(index):
    calibrate(index, NormalizedL2(), held_out())
    for given, damped in (({}, True), ({"damp_captions": False}, False)):
        assert GuidanceSettings("multiplicity", **given).build(index)[0].damped is damped
