"""A study from its YAML to its tables, with commands that only pretend to work."""

import json
import shlex
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from memfree.cli import entry
from memfree.cli.stages import Stage
from memfree.evaluation.metrics import metric, write_metrics
from memfree.folders.atomic import write_json
from memfree.folders.manifest import read_manifest
from memfree.study.grid import Cell
from memfree.study.plan import GridPlan
from memfree.study.running import CellRun, plan_size

CONFIGS = Path(__file__).parents[2] / "configs" / "study"
TRAINED = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("emoji_")]
LADDER = """
name: trial
grids:
  - {factor: [1, 64], conditioning: [unconditional, class]}
  - {ladder: [[1, 2, 8]], size: [40]}
training_seeds: [1, 2]
subjects:
  unguided: {mitigation: none}
  amg: {mitigation: amg, gate_margin: 0}
"""


def finish(out):
    """A manifest, without asking git for the commit."""
    write_json(out / "manifest.json", {"format": 1, "kind": "samples"})


class Pretending:
    """Stands for the commands: each writes its manifest, and figures where it is an evaluation."""

    def __init__(self):
        self.ran = []
        self.fail_at = None

    def __call__(self, stage):
        if self.fail_at is not None and len(self.ran) == self.fail_at:
            raise KeyboardInterrupt
        out = Path(stage.options["out"])
        self.ran.append(stage.line())
        if stage.command == "evaluate":
            self._evaluate(stage, out)
        finish(out)

    def _evaluate(self, stage, out):
        name = out.parent.name
        copies = 0.8 if "x64" in name else 0.05
        figures = []
        subjects = [key[8:] for key in stage.options if key.startswith("samples.")]
        for subject in [*subjects, "heldout"]:
            rate = copies if subject == "unguided" else 0.0
            figures += [
                metric("copies", subject, rate, 100),
                metric("second_copies", subject, rate, 100),
                metric("frechet_pixels", subject, 1 + rate, 100),
                metric("distance_ratio_below_third", subject, rate, 100),
            ]
            for factor in (1, 2, 8):
                figures.append(metric(f"copies_per_image_of_factor_{factor}", subject, factor, 100))
        write_metrics(out / "metrics.json", figures)
        table = {
            "subject": ["unguided"] * 60,
            "nearest_multiplicity": [1, 2, 8] * 20,
            "nearest_key": ["a", "b", "c"] * 20,
            "copy": [False, True, True] * 5 + [False, False, True] * 15,
            "distance_ratio": [0.5] * 60,
        }
        pq.write_table(pa.table(table), out / "per_sample.parquet")


@pytest.fixture
def pretending(monkeypatch):
    made = Pretending()
    monkeypatch.setattr(Stage, "run", lambda stage: made(stage))
    return made


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(LADDER + f"out: {tmp_path / 'out'}\n")
    return str(path)


def run(*words):
    return entry.main(["study", *words])


def test_a_study_runs_shared_commands_once_and_goes_on_where_it_stopped(
    pretending, config, tmp_path
):
    pretending.fail_at = 9
    with pytest.raises(SystemExit) as stopped:
        run(config)
    assert stopped.value.code == 130
    first, pretending.ran, pretending.fail_at = pretending.ran, [], None
    run(config)
    again = [line for line in pretending.ran if line in first]
    # Of the cell that was interrupted its finished commands are asked again, and say so at once.
    assert len(again) < 9 and pretending.ran[0] in first
    every = set(first) | set(pretending.ran)
    by_command = {}
    for line in every:
        by_command.setdefault(line.split(" --")[0], []).append(line)
    assert len(by_command["memfree prepare"]) == len(by_command["memfree index"]) == 2 * 3
    assert len(by_command["python train.py"]) == 2 * 5
    assert len(by_command["python sample.py"]) == 2 * 2 * 5
    pretending.ran = []
    run(config)
    assert pretending.ran == [], "everything is finished"


def test_a_subject_that_is_added_makes_cells_run_again(pretending, config, tmp_path):
    run(config)
    given = yaml.safe_load(Path(config).read_text())
    given["subjects"]["both"] = {"mitigation": "both"}
    Path(config).write_text(yaml.safe_dump(given))
    pretending.ran = []
    run(config)
    assert sum("samples/both" in line and "sample.py" in line for line in pretending.ran) == 10


def test_a_cell_with_oracles_that_share_commands_is_finished(pretending, config, tmp_path):
    for part in ("1/2", "2/2"):
        run(config, "--oracle=true", f"--part={part}")
    assert (tmp_path / "out" / "trial.csv").exists()
    pretending.ran = []
    run(config, "--oracle=true")
    assert pretending.ran == []


def test_the_part_that_comes_last_writes_the_tables(pretending, config, tmp_path, capsys):
    out = tmp_path / "out"
    run(config, "--part", "1/2")
    assert "part 1/2 is done; 5 cells of others are not" in capsys.readouterr().out
    assert not (out / "trial.csv").exists()
    done = list(pretending.ran)
    run(config, "--part=none")
    assert "5 of 10 cells are not finished" in " ".join(capsys.readouterr().out.split())
    assert pretending.ran == done
    run(config, "--part=2/2")
    assert (out / "trial.csv").exists()
    assert "5 of 10" not in (out / "trial.md").read_text()
    manifest = read_manifest(out, "study")
    assert len(manifest["cells"]) == 10
    kept = (out / "config.yaml").read_text()
    assert "name: trial" in kept and "part: all" in kept


def test_results_are_one_row_a_figure_with_the_grid_and_a_folder(pretending, config, tmp_path):
    run(config)
    out = tmp_path / "out"
    rows = pa_csv.read_csv(out / "trial.csv").to_pylist()
    assert pq.read_table(out / "trial.parquet").num_rows == len(rows)
    ladder = [row for row in rows if row["ladder"] == "1 2 8"]
    assert {(row["factor"], row["size"], row["steps"]) for row in ladder} == {(0, 40, 1500)}
    at = {row["metric"]: row for row in ladder if row["training_seed"] == 2}
    assert at["copies_at_factor_2"]["value"] == 0.25 and at["copies_at_factor_2"]["count"] == 20
    for row in rows:
        expected = "samples" if row["subject"] in ("unguided", "amg") else "evaluation-trial"
        assert expected in row["folder"] and (out / row["folder"]).is_dir()
    text = (out / "trial.md").read_text()
    assert "### Logistic fit in log2 of the factor" in text
    assert "| unconditional, 40 images, ladder | unguided | 2 | 2 (2–2) | 25.0 (" in text
    page = (out / "trial.html").read_text()
    assert 'href="class-x64-seed1/samples/amg/"' in page and "data:image/png" in page
    assert (out / "trial.png").stat().st_size > 5000
    assert not [*out.glob("*oracle*")], "no oracle to draw beside"


def test_the_plan_estimates_what_is_left_from_what_is_finished(pretending, tmp_path):
    plan = GridPlan("trial", tmp_path, {"unguided": {}, "amg": {}}, steps=100, count=50)
    runs = [CellRun(plan, Cell("unconditional", (1,), seed)) for seed in (1, 2, 3)]
    assert "3 trainings (300 steps), 0 finished" in plan_size(runs)
    assert "6 samplings (300 samples)" in plan_size(runs)
    assert "no command is finished" in plan_size(runs)
    runs[0].run(Console(quiet=True))
    record = tmp_path / "unconditional-x1-seed1" / "study-trial.json"
    seconds = {"prepare": 1, "index": 2, "train": 600, "sample": 30, "evaluate": 10}
    rows = [
        {"command": stage.line(), "seconds": seconds[stage.command]} for stage in runs[0].stages
    ]
    record.write_text(json.dumps(rows))
    found = plan_size(runs)
    assert "18 commands, 6 of them finished" in found
    assert f"about {2 * (1 + 2 + 600 + 60 + 10) / 60:.0f} minutes" in found
    for damaged in ("[{}]", "[[[", "{", "3", "[" * 100_000):
        record.write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            plan_size(runs)


def test_two_processes_do_not_run_one_command_at_once(monkeypatch, tmp_path, capsys):
    """Cells with data in common, in a folder that one names from here and the other from /."""
    running, most = [], []

    def slowly(stage):
        made = Path(stage.options["out"]).resolve()
        running.append(made)
        most.append(running.count(made))
        time.sleep(0.05)
        running.remove(made)
        finish(made)

    monkeypatch.setattr(Stage, "run", slowly)
    monkeypatch.chdir(tmp_path)
    runs = [
        CellRun(GridPlan("trial", out, {"unguided": {}}), Cell(kind, (1,), 1))
        for out, kind in ((tmp_path / "out", "unconditional"), (Path("out"), "class"))
    ]
    threads = [threading.Thread(target=run.run, args=(Console(),)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 10
    assert "waiting for another process that makes" in capsys.readouterr().out
    assert not [*(tmp_path / "out" / ".turns").iterdir()], "locks are removed"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subjects": {}}, "--subjects is empty"),
        ({"subjects": {"kappa_2.5": {}}}, "--subjects: use letters"),
        ({"grids": [{"factor": [1], "model": ["wide"]}]}, "no model 'wide' below --models"),
        ({"grids": []}, "the study has no cell"),
        ({"grids": [{"factor": [0]}]}, "factor"),
        ({"oracle": True, "subjects": {"oracle_steps": {}}}, "are models of --oracle"),
        ({"part": "9/8"}, "--part 9/8"),
        ({"subjects": {"heldout": {}}}, "--subjects: heldout"),
        ({"subjects": {"a": {"mitigation": "amgg"}}}, "--options.sample or --subjects: "),
        ({"models": {"ladder": {}}}, "--models: 'ladder'"),
        ({"models": {"a": {"trainer.max_steps": None}}}, "--models.a: the study sets trainer.max"),
        ({"options": {"train": {"trainer.max_steps": None}}}, "use --steps"),
        ({"options": {"train": {"trainer": {"max_steps": 5}}}}, "--options.train: the study sets"),
        ({"options": {"train": {"trainer.max_stps": 5}}}, "did you mean --trainer.max_steps?"),
        ({"options": {"prepare": {"parts.train": "x"}}, "oracle": True}, "--options.prepare"),
        ({"options": {"sample": {"out": "x"}}}, "the study sets out itself; use --out"),
        ({"options": {"sample": {"count": "many"}}}, "--options.sample: the study sets count"),
        ({"options": {"sample": {"mitigation": "amg"}}}, "--options.sample: the study sets"),
        ({"options": {"sample": {"allow_code": True}}}, "--options.sample: the study sets"),
        ({"options": {"sample": {"batch_size": "many"}}}, "--batch_size"),
        ({"options": {"evaluate": {"samples.x": "x"}}}, "--options.evaluate: the study sets sampl"),
        ({"grids": [{"ladder": [[]]}]}, "--grids: a ladder is empty"),
    ],
)
def test_wrong_options_are_refused_in_one_line(changed, message, config, capsys, tmp_path):
    given = {**yaml.safe_load(Path(config).read_text()), **changed}
    Path(config).write_text(yaml.safe_dump(given))
    with pytest.raises(SystemExit) as refused:
        run(config, "--dry_run=true")
    assert not (tmp_path / "out").exists()
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_every_command_of_every_configuration_parses(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])  # training options name files of configs
    run(str(path), f"--out={tmp_path / 'out'}", "--dry_run=true")
    assert not (tmp_path / "out").exists()
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("memfree ", "python "))
    ]
    assert len(lines) == len(set(lines)) and any("train.py" in line for line in lines)
    checked = set()
    for line in lines:
        words = shlex.split(line)
        command, rest = (
            (words[1].removesuffix(".py"), words[2:])
            if words[0] == "python"
            else (words[1], words[2:])
        )
        # One command of each set of options: they differ in their paths and numbers.
        kind = (command, tuple(word for word in rest if word.startswith("--mitigation")))
        kind = (*kind, tuple(word.split("=")[0] for word in rest if "samples." not in word))
        if kind in checked:
            continue
        checked.add(kind)
        with pytest.raises(SystemExit) as exit_:
            entry.run_command(command, [*rest, "--print_config"])
        assert exit_.value.code == 0, line
        capsys.readouterr()


def test_no_study_reports_from_the_seed_that_settings_were_chosen_on():
    seeds = {path.stem: yaml.safe_load(path.read_text())["training_seeds"] for path in TRAINED}
    chosen = seeds.pop("settings")
    assert not set(chosen) & {seed for each in seeds.values() for seed in each}
    assert np.all([len(each) for each in seeds.values()])
