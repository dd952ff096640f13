"""Every script of examples/ runs, at tiny sizes and without a network, and is short."""

import runpy
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import tiny_pipelines
from diffusers import DDPMPipeline
from guard_parts import make_index
from torchvision.utils import save_image

from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, PartSizes
from memfree.guidance import NormalizedL2, calibrate
from memfree.retrieval import ReferenceIndex

EXAMPLES = Path(__file__).parents[1] / "examples"
CALLED = {"own_trainer", "guard_a_pipeline", "audit_a_folder"}
"""By the tests below."""


def example(name):
    """The main function of a script."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    sizes = PartSizes(train=100, calibration=500, test=20, fit=20)
    prepare(out, parts=sizes, plan=DuplicationPlan(images=4, factor=8))
    return out


def test_all_examples_are_called_here_and_short():
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == CALLED
    for text in scripts.values():
        assert text.count("\n") <= 25
        assert text.endswith('\n\nif __name__ == "__main__":\n    main()\n')


def test_own_trainer(digits, tmp_path):
    example("own_trainer")(str(digits), str(tmp_path / "out"), steps=3)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out" / "diffusers")
    assert pipe.unet.config.sample_size == 8
    exposures = parquet.read_table(tmp_path / "out" / "exposures.parquet")
    assert sum(exposures["exposures"].to_pylist()) > 64


def test_guard_a_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.stable_diffusion().save_pretrained("model")
    make_index().save("index")
    example("guard_a_pipeline")("model", "index")
    assert "no copy" in capsys.readouterr().out
    assert len([*Path("runs/guarded").glob("*.png")]) == 2


def test_audit_a_folder(digits, tmp_path, capsys):
    folder = DatasetFolder(digits)
    index = ReferenceIndex.build(digits)
    calibrate(index, NormalizedL2(), folder.part("calibration").images())
    index.save(tmp_path / "index")
    (tmp_path / "images").mkdir()
    train = folder.part("train")
    for i in range(12):
        save_image(train.images()[i] / 2 + 0.5, tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    example("audit_a_folder")(
        str(tmp_path / "images"), str(tmp_path / "index"), str(tmp_path / "audit")
    )
    said = capsys.readouterr().out
    assert said.count(" is a copy of ") == 12 and "could not be judged" in said
