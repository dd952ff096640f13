"""A Mitigation of the user's own: an object, or an import path, in sampling and in the guard."""

import sys

import pytest
import tiny_pipelines
import torch

import memfree
from memfree.guidance import GuidanceSettings, NormalizedL2, calibrate
from memfree.guidance.mitigation import Mitigation, mitigation_at
from memfree.retrieval import PixelFeatures, ReferenceIndex

OWN = """
from memfree.guidance import Mitigation

class Scaled(Mitigation):
    def __init__(self):
        self.seen = 0

    def accept(self, images):
        self.seen += len(images)
        return super().accept(images)

class WithOptions(Scaled):
    def __init__(self, scale):
        super().__init__()

instance = WithOptions(2)
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module of the user's, which is imported by a test alone."""
    (tmp_path / "their_mitigations.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_mitigations"
    sys.modules.pop("their_mitigations", None)


@pytest.fixture
def index():
    generator = torch.Generator().manual_seed(0)
    shape = (3, tiny_pipelines.PIXELS, tiny_pipelines.PIXELS)
    images = torch.rand(60, *shape, generator=generator) * 2 - 1
    index = ReferenceIndex.build(images, PixelFeatures())
    calibrate(index, NormalizedL2(), torch.rand(600, *shape, generator=generator) * 2 - 1)
    return index


def test_a_class_or_an_instance_is_built_with_the_settings(own, index):
    settings = GuidanceSettings(f"{own}.Scaled")
    made = [settings.for_text(), *settings.for_pixels(index).mitigations[:1]]
    assert [type(one).__name__ for one in made] == ["Scaled", "Scaled"]
    assert settings.for_text(index).mitigations[1].guidances()  # an observer for the trace
    assert mitigation_at(f"{own}.instance") is mitigation_at(f"{own}.instance")
    settings.check(None, None)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("number", "is not a memfree.guidance.Mitigation"),
        ("Mitigations", "cannot be imported"),
        ("WithOptions", "name an instance"),
        ("missing.Mine", "cannot be imported"),
    ],
)
def test_anything_else_is_refused(own, name, told):
    with pytest.raises(ValueError, match=told) as error:
        GuidanceSettings(f"{own}.{name}").check(None, None)
    assert f"--mitigation {own}.{name}" in str(error.value)


def test_a_name_that_is_neither_is_refused():
    for name in ("wenn", "", "a..b", "a b.c"):
        with pytest.raises(ValueError, match="--mitigation"):
            GuidanceSettings(name)


def test_the_guard_takes_an_object_or_an_import_path(own, index):
    pipe = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    size = tiny_pipelines.PIXELS
    options = {"height": size, "width": size, "num_inference_steps": 2, "output_type": "pt"}
    mine = mitigation_at(f"{own}.instance")
    images = []
    for mitigation in (Mitigation(), mine, f"{own}.instance"):
        with memfree.guard(pipe, index, mitigation=mitigation, seed=1):
            images.append(pipe("x", generator=torch.Generator().manual_seed(0), **options).images)
    assert mine.seen == 2 and all(torch.equal(images[0], image) for image in images)
    with pytest.raises(ValueError, match="Mitigation"), memfree.guard(pipe, index, mitigation="a"):
        pass
