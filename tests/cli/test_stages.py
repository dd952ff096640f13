"""Stages are printed as a user types them and are run by the same parser."""

import shlex

import pytest
from rich.console import Console

from memfree.cli.stages import Stage, run_stages
from memfree.commands.demo import demo_stages


def test_a_stage_is_a_command_line():
    stage = Stage("sample", {"count": 3, "mitigation.rate": False, "classes": [1, 2]})
    assert stage.line() == "python sample.py --count=3 --mitigation.rate=false '--classes=[1,2]'"
    assert shlex.split(stage.line())[2:] == stage.arguments()
    assert Stage("index", {"out": "a b"}).line() == "memfree index '--out=a b'"


def test_options_are_checked_without_running(tmp_path):
    folders = {"dataset": tmp_path / "none", "out": tmp_path / "index"}
    Stage("index", folders).check()
    with pytest.raises(
        ValueError, match=r"^unknown option --batch_sise, did .*\(in: memfree index"
    ):
        Stage("index", {**folders, "batch_sise": 3}).check()
    with pytest.raises(ValueError, match=r"^missing option --dataset \(in: memfree index --out="):
        Stage("index", {"out": tmp_path}).check()
    with pytest.raises(ValueError, match=r"^--count: Not of type PositiveInt.*python sample.py"):
        Stage("sample", {"model": "m", "out": tmp_path, "count": 0}).check()
    assert not list(tmp_path.iterdir())


def test_a_failing_stage_ends_the_chain_with_its_own_line(tmp_path, capsys):
    stages = [Stage("index", {"dataset": tmp_path / "none", "out": tmp_path / "index"})]
    with pytest.raises(SystemExit) as caught:
        run_stages(stages, Console())
    assert caught.value.code == 2
    assert "no dataset folder" in capsys.readouterr().err


def test_demo_samples_differ_by_the_mitigation_alone(tmp_path):
    stages = demo_stages(tmp_path, 0, 16, 64, 1500, 1300, 2.0)
    samples = [stage.options for stage in stages if stage.command == "sample"]
    assert [one["mitigation"] for one in samples] == ["none", "amg", "both"]
    for one in samples:
        own = {"out", "mitigation"}
        assert {k: v for k, v in one.items() if k not in own} == {
            k: v for k, v in samples[0].items() if k not in own
        }
    assert samples[0]["guidance_scale"] >= 2 and samples[0]["count"] >= 1300
