from pathlib import Path

import pytest

from memfree import cli
from memfree.evaluation.metrics import metric, write_metrics
from memfree.manifest import read_manifest, write_manifest
from memfree.study.grid import SETS, Cell, Plan, study


def plan(name):
    return Plan(name, Path("runs"), 16, 1500, 1000, 2.0)


def options(stages, command):
    return [stage.options for stage in stages if stage.command == command]


def test_the_oracle_study_trains_on_deduplicated_data_at_equal_steps_and_equal_epochs():
    stages = plan("oracle").stages(Cell("unconditional", 64, 1))
    trained = {str(one["data.path"]): [] for one in options(stages, "train")}
    for one in options(stages, "train"):
        trained[str(one["data.path"])].append(one["trainer.max_steps"])
    # 500 images are 1508 records with 16 of them 64 times: 1500 * 500 / 1508 steps.
    assert trained == {
        "runs/unconditional-x64-seed1/data": [1500],
        "runs/unconditional-x1-seed1/data": [1500, 497],
    }
    (evaluated,) = options(stages, "evaluate")
    assert evaluated["other_data"] == ["oracle_steps", "oracle_epochs"]
    assert "samples.oracle_epochs" in evaluated


@pytest.mark.parametrize("name, factor", [("oracle", 1), ("ablation", 64), ("settings", 64)])
def test_other_cells_train_one_model_and_sample_it_in_every_way(name, factor):
    stages = plan(name).stages(Cell("class", factor, 1))
    assert len(options(stages, "train")) == 1
    assert [one["out"].name for one in options(stages, "sample")] == SETS[name]
    assert "other_data" not in options(stages, "evaluate")[0]


def test_every_way_of_sampling_starts_from_the_same_noise():
    stages = plan("oracle").stages(Cell("class", 64, 2))
    assert {one["seed"] for one in options(stages, "sample")} == {1002}


def test_a_summarised_study_says_what_made_it(tmp_path):
    done = tmp_path / "class-x64-seed1" / "evaluation-settings"
    write_metrics(done / "metrics.json", [metric("copies", "unguided", 0.5, 10)])
    write_manifest(done, "evaluation")
    sizes = ["--training_seeds=[1]", "--unconditional_factors=[]", "--class_factors=[64]"]
    cli.run(study, ["--name=settings", f"--out={tmp_path}", *sizes])
    manifest = read_manifest(tmp_path, "study")
    assert (manifest["name"], manifest["cells"]) == ("settings", ["class-x64-seed1"])
    saved = (tmp_path / "config.yaml").read_text()
    assert "name: settings" in saved
    cli.run(study, ["--name=oracle", f"--out={tmp_path}", *sizes, "--dry_run=true"])
    assert (tmp_path / "config.yaml").read_text() == saved
