"""The demo's chain, tuning and the Python example of docs/howto.md, on few real digits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from memfree.cli.entry import main, run
from memfree.commands import tune
from memfree.commands.demo import demo
from memfree.commands.sample import predict
from memfree.evaluation import read_metrics
from memfree.folders.manifest import read_manifest
from memfree.guidance import GuidanceSettings
from memfree.sampling import SampleFolder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demo of few steps: it learns little, but every command runs as it does in full."""
    out = tmp_path_factory.mktemp("demo") / "out"
    run(demo, [f"--out={out}", "--steps=30", "--count=40"])
    return out


def test_the_chain_ends_in_a_report(made):
    table = read_metrics(made / "evaluation" / "metrics.json")
    for subject in ("unguided", "amg", "both", "heldout"):
        assert table.get("copies", subject) is not None
        assert table.get("second_copies", subject) is not None
    page = (made / "evaluation" / "report" / "index.html").read_text()
    assert "<img" in page and "http://" not in page
    assert "(licence: " in page


def test_every_folder_says_how_to_repeat_it(made):
    folders = ["", "data", "index", "model", "evaluation", "evaluation/report"]
    for folder in [*folders, *(f"samples/{name}" for name in ("unguided", "amg", "both"))]:
        assert (made / folder / "config.yaml").is_file(), folder
        assert json.loads((made / folder / "manifest.json").read_text())["made_by"], folder
    assert read_manifest(made, "demo")["made_by"]["seed"] == 7
    read_manifest(made / "evaluation" / "report", "report")


STUDY = Path(__file__).parents[2] / "configs" / "study" / "conditioning.yaml"


@pytest.mark.parametrize("command", ["demo", "report", "study"])
def test_chains_and_pages_leave_other_folders_alone(made, capsys, command):
    options = {
        "demo": [f"--out={made / 'model'}"],
        "report": [f"--evaluation={made / 'evaluation'}", f"--out={made / 'model'}"],
        "study": [str(STUDY), f"--out={made / 'model'}"],
    }
    before = {path: path.stat().st_mtime_ns for path in made.joinpath("model").rglob("*")}
    with pytest.raises(SystemExit) as caught:
        main([command, *options[command]])
    assert caught.value.code == 2
    assert f"holds 'model', not a {command} folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in made.joinpath("model").rglob("*")} == before


def test_samples_start_from_the_same_noise_and_classes(made):
    folders = [SampleFolder(made / "samples" / name) for name in ("unguided", "amg", "both")]
    for one in folders[1:]:
        assert torch.equal(one.seeds, folders[0].seeds)
        assert torch.equal(one.conditions, folders[0].conditions)
    assert len(folders[0].images()) == 40


def test_a_second_demo_repeats_nothing(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.tar")}
    run(demo, [f"--out={made}", "--steps=30", "--count=40"])
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.tar")} == before
    assert "is already trained as asked" in capsys.readouterr().out


def test_tune_writes_strengths_that_sampling_takes(made, tmp_path, capsys, monkeypatch):
    # The model has learned too little to copy: say how many copies each strength leaves.
    judge = tune._judge
    copies = {0.0: 0.5, 1.0: 0.1, 2.0: 0.0}
    monkeypatch.setattr(
        tune,
        "_judge",
        lambda scale, *rest: replace(judge(scale, *rest), copies=copies[scale]),
    )
    out = tmp_path / "tune"
    arguments = [f"--model={made / 'model'}", f"--index={made / 'index'}", f"--out={out}"]
    options = ["--count=8", "--steps=5", "--guidance_scale=2", "--scales=[2,1,4]"]
    main(["tune", *arguments, *options])
    assert "Strengths tried" in capsys.readouterr().out
    trials = json.loads((out / "tune.json").read_text())
    assert [trial["scale"] for trial in trials] == [0.0, 1.0, 2.0]
    assert trials[0]["displacement"] == 0
    chosen = yaml.safe_load((out / "guidance.yaml").read_text())
    assert chosen["mitigation"]["name"] == "amg" and chosen["guidance_scale"] == 2
    assert chosen["mitigation"]["c3"] == 2 * GuidanceSettings().c3
    manifest = read_manifest(out, "tuning")
    assert (manifest["scale"], manifest["count"], manifest["made_by"]["seed"]) == (2, 8, 1_000_000)
    assert manifest["model"] == str(made / "model")

    config = f"--config={out / 'guidance.yaml'}"
    run(predict, [config, *arguments[:2], f"--out={tmp_path / 'samples'}", "--count=4"])
    manifest = SampleFolder(tmp_path / "samples").manifest
    assert manifest["mitigation"] == "amg" and manifest["steps"] == 5

    # Into the folder of an earlier tuning, whose strengths do not outlive it.
    with pytest.raises(SystemExit):
        main(["tune", *arguments, "--count=8", "--steps=5", "--scales=[1]"])
    assert "copies remain at every scale" in capsys.readouterr().err
    assert not (out / "guidance.yaml").exists()
    assert read_manifest(out, "tuning")["scale"] is None
    assert yaml.safe_load((out / "config.yaml").read_text())["scales"] == [1.0]


def test_tune_refuses_a_folder_of_something_else(made, tmp_path, capsys):
    def refused(out):
        with pytest.raises(SystemExit) as caught:
            main(["tune", f"--model={made / 'model'}", f"--index={made / 'index'}", f"--out={out}"])
        assert caught.value.code == 2
        return capsys.readouterr().err

    before = {path: path.read_bytes() for path in made.joinpath("model").glob("*.*")}
    assert "holds 'model', not a tuning folder" in refused(made / "model")
    assert {path: path.read_bytes() for path in made.joinpath("model").glob("*.*")} == before
    (tmp_path / "thesis.tex").touch()
    assert "thesis.tex" in refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mitigation=none"], "only amg and both"),
        (["--scales=[]"], "--scales"),
        (["--model=nowhere"], "no model folder at nowhere"),
        (["--count=4", "--steps=2"], "there is nothing to tune"),
    ],
)
def test_tune_refuses_in_one_line(made, tmp_path, capsys, options, message):
    arguments = [f"--model={made / 'model'}", f"--index={made / 'index'}", f"--out={tmp_path}/t"]
    with pytest.raises(SystemExit) as caught:
        main(["tune", *arguments, *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_the_python_example_of_the_documentation_runs_as_written(made, monkeypatch, tmp_path):
    text = (ROOT / "docs" / "howto.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(made / "model")
    (tmp_path / "runs" / "index").symlink_to(made / "index")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "docs/howto.md", "exec"), names)
    assert names["result"].images.shape == (10, 1, 8, 8)
