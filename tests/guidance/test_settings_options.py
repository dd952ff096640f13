"""Options of guidance that are out of range: one line that names them, from either side."""

import pytest
import torch

from memfree.cli.entry import run
from memfree.guidance import (
    EmbeddingSimilarity,
    GuidanceSettings,
    NormalizedL2,
    ThresholdSchedule,
    calibrate,
)
from memfree.guidance.baselines import LowerGuidance, LowerGuidanceOptions, PromptReanchoring
from memfree.retrieval import PixelFeatures, ReferenceIndex


class CosineFeatures(PixelFeatures):
    """Pixels as directions."""

    metric = "cosine"

    def forward(self, images):
        return torch.nn.functional.normalize(super().forward(images), dim=1)


def index_of(features=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 4, 4, generator=generator) * 2 - 1
    index = ReferenceIndex.build(images, features or PixelFeatures())
    held_out = torch.rand(600, 1, 4, 4, generator=generator) * 2 - 1
    calibrate(index, NormalizedL2() if features is None else EmbeddingSimilarity(), held_out)
    return index


def take(guidance: GuidanceSettings = GuidanceSettings()) -> GuidanceSettings:  # noqa: B008
    """Take settings.

    Args:
        guidance: them.
    """
    return guidance


@pytest.mark.parametrize(
    "option",
    [
        "amg.c1=-1",
        "amg.c2=-0.1",
        "amg.c3=-1",
        "multiplicity.strength=-1",
        "amg.gate_margin=-0.1",
        "both.margin_per_doubling=-1",
        "both.max_displacement=-1",
        "amg.least_scale=1.1",
        "none.start_ratio=0",
        "none.start_ratio=-1",
        "none.rate=0",
        "none.rate=-1",
        "wen.cadence_always_below=1.5",
        "lower_guidance.guidance_scale=0.5",
    ],
)
def test_an_option_out_of_range_is_named_on_the_command_line(capsys, option):
    with pytest.raises(SystemExit) as exit_:
        mitigation, _, option = option.partition(".")
        run(take, [f"--mitigation={mitigation}", f"--mitigation.{option}"])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    name, value = option.split("=")
    assert f"--mitigation.{name}" in line and value in line and "Traceback" not in line


def test_zero_and_null_stay_what_they_were():
    settings = run(
        take,
        [
            "--mitigation=amg",
            *(f"--mitigation.{key}=0" for key in ("c1", "max_displacement", "c3")),
        ],
    )
    assert (settings.c1, settings.max_displacement, settings.c3) == (0, 0, 0)
    assert settings == GuidanceSettings("amg", c1=0, max_displacement=0, c3=0)


@pytest.mark.parametrize("features", [None, CosineFeatures()])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start_ratio": 0}, "--mitigation.start_ratio must be above 0, not 0"),
        ({"start_ratio": -1.2}, "--mitigation.start_ratio must be above 0, not -1.2"),
        ({"rate": -1}, "rate of the threshold must be above 0, not -1"),
        ({"c2": -1}, "c2 must be at least 0"),
        ({"caption_policy": "most_common", "caption_neighbours": 99}, "caption_neighbours 99: the"),
    ],
)
def test_wrong_values_from_python_are_refused_before_anything_is_drawn(features, wrong, message):
    with pytest.raises(ValueError, match=message):
        GuidanceSettings("amg", **wrong).check(index_of(features), None)
    GuidanceSettings("amg").check(index_of(features), None)


def test_a_schedule_rises_or_is_refused():
    for rate in (0, -1.0):
        with pytest.raises(ValueError, match="rate of the threshold must be above 0"):
            ThresholdSchedule(-1.95, -1.5, rate)


def test_the_cadences_end_is_an_option():
    given = ["--mitigation=amg", "--mitigation.cadence=10"]
    index = index_of()
    for extra, below in (([], 0.3), (["--mitigation.cadence_always_below=0.1"], 0.1)):
        (amg,) = run(take, [*given, *extra]).build(index)
        assert (amg.cadence.every, amg.cadence.always_below) == (10, below)
    observer = GuidanceSettings(cadence=10, cadence_always_below=0.1).observer(index)
    assert observer.cadence.always_below == 0.1


def test_lower_guidance_below_one_is_refused():
    """diffusers switches guidance off there, and a loop would step with less than the prompt."""
    for scale in (0.0, 0.5, 0.999):
        message = f"--mitigation.guidance_scale must be at least 1, not {scale:g}"
        with pytest.raises(ValueError, match=message):
            LowerGuidance(LowerGuidanceOptions(scale))
    assert LowerGuidance(LowerGuidanceOptions(1.0)).guidance_scale(7.5) == 1


def test_a_search_without_prompts_says_what_to_give():
    message = "captions of the index: give --index .* or pass --mitigation.alternative optimized"
    with pytest.raises(ValueError, match=message):
        PromptReanchoring()
