"""Expansion of grids against brute force, and the commands of cells."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from memfree.cli import entry
from memfree.cli.errors import options_of
from memfree.commands.study import study
from memfree.study.grid import Cell, Grid, expand
from memfree.study.plan import INPUTS, CommandOptions, GridPlan

SUBJECTS = {
    "unguided": {"mitigation": "none"},
    "reject": {"mitigation": "reject", "budget": 10},
}
GRIDS = [
    Grid(
        conditioning=["unconditional", "class", "random_labels", "unique_labels"],
        factor=[1, 16],
        ladder=[[4, 1, 2]],
        size=[0, 64],
        model=["default", "wide"],
        steps=[0, 300],
    ),
    Grid(factor=[1, 64]),
]


def plan(**changes):
    given = {"name": "trial", "out": Path("runs"), "subjects": SUBJECTS, "models": {"wide": {}}}
    return GridPlan(**{**given, **changes})


def options(stages, command):
    return [stage.options for stage in stages if stage.command == command]


def test_expansion_is_the_product_of_each_grid_without_repetitions():
    expected = set()
    for seed in (1, 2):
        for conditioning, factors, size, model, steps in itertools.product(
            GRIDS[0].conditioning, [(1,), (16,), (1, 2, 4)], [0, 64], ["default", "wide"], [0, 300]
        ):
            expected.add((conditioning, factors, seed, size, model, steps))
        expected |= {("unconditional", (factor,), seed, 0, "default", 0) for factor in (1, 64)}
    cells = expand(GRIDS, [1, 2])
    found = [(c.conditioning, c.factors, c.seed, c.size, c.model, c.steps) for c in cells]
    assert set(found) == expected and len(found) == len(expected) == 2 * (96 + 1)
    assert len({cell.name for cell in cells}) == len(cells), "folders are the cells' own"
    assert expand(GRIDS, [1, 2]) == cells
    with pytest.raises(ValueError, match="the study has no cell"):
        expand([Grid()], [1])
    with pytest.raises(ValueError, match="--grids: a ladder is empty"):
        expand([Grid(ladder=[[1, 2], []])], [1])


@pytest.mark.parametrize("names", [("default", "100-steps"), ("Wide", "wide")])
def test_cells_that_would_share_a_folder_are_refused(names):
    first, second = (Grid(factor=[1], model=[name]) for name in names)
    first.steps[:] = [100] if names[0] == "default" else [0]
    assert len(expand([first], [1])) == len(expand([second], [1])) == 1
    with pytest.raises(ValueError, match="--grids: two models would share the folder uncond"):
        expand([first, second], [1])


def test_names_say_what_differs_from_the_study():
    assert Cell("class", (64,), 3).name == "class-x64-seed3"
    cell = Cell("unique_labels", (1, 2, 4), 3, 128, "wide", 300)
    assert cell.name == "unique_labels-x1-2-4-n128-seed3-wide-300-steps"
    assert cell.data == "unique_labels-x1-2-4-n128-seed3"
    assert replace(cell, conditioning="class").data == "x1-2-4-n128-seed3"


def test_cells_share_data_and_index_but_no_model():
    cells = expand(GRIDS, [1])
    stages = [stage for cell in cells for stage in plan().stages(cell)]
    distinct = {command: set() for command in ("prepare", "index", "train")}
    for stage in stages:
        if stage.command in distinct:
            distinct[stage.command].add(stage.line())
    # Three label policies (class and none need the same data) x three factors x two sizes; x64.
    assert len(distinct["prepare"]) == len(distinct["index"]) == 3 * 3 * 2 + 1
    assert len(distinct["train"]) == len(cells)
    by_out = {}
    for stage in stages:
        assert by_out.setdefault(str(stage.options["out"]), stage.line()) == stage.line()


def test_options_of_a_cell_reach_its_commands():
    given = CommandOptions(
        prepare={"parts.calibration": 500}, train={"config": "x.yaml", "data.num_workers": 2}
    )
    wide = {"wide": {"model.network.layers_per_block": 2}}
    cell = Cell("random_labels", (1, 2, 4), 3, 128, "wide", 300)
    stages = plan(options=given, models=wide).stages(cell)
    (prepared,) = options(stages, "prepare")
    assert prepared["limit"] == 128 and prepared["labels"] == "random"
    assert prepared["plan.ladder"] == [1, 2, 4] and prepared["plan.images_per_factor"] == 16
    assert prepared["parts.calibration"] == 500
    (trained,) = options(stages, "train")
    assert next(iter(trained)) == "config", "what stands behind a file wins over it"
    assert trained["trainer.max_steps"] == 300 and trained["model.network.layers_per_block"] == 2
    assert trained["data.num_workers"] == 2 and trained["model.class_conditional"]
    sampled = options(stages, "sample")
    assert [one["mitigation"] for one in sampled] == ["none", "reject"]
    assert {one["seed"] for one in sampled} == {1003}, "the same noise"
    assert {one["guidance_scale"] for one in sampled} == {2.0}
    unconditional = options(plan().stages(Cell("unconditional", (1,), 1)), "sample")
    assert {one["guidance_scale"] for one in unconditional} == {1.0}


def test_the_oracle_is_trained_on_deduplicated_data_at_equal_steps_and_equal_epochs():
    cell = Cell("unconditional", (64,), 1)
    stages = plan(oracle=True, shared_data=False).stages(cell)
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
    alone = plan(oracle=True).stages(Cell("unconditional", (1,), 1))
    assert len(options(alone, "train")) == 1
    ladder = plan(oracle=True).equal_epochs(Cell("unconditional", (1, 3), 1, 100))
    assert ladder == round(1500 * 100 / (100 + 16 * 2))
    with pytest.raises(ValueError, match="--oracle needs the number of training images"):
        plan(oracle=True, source="folder").stages(cell)


def test_the_oracle_needs_a_number_of_training_images():
    for wrong in ("x", None, 0, 2.5):
        given = CommandOptions(prepare={"parts.train": wrong})
        with pytest.raises(ValueError, match="--oracle needs the number of training images"):
            plan(oracle=True, source="folder", options=given).stages(Cell("class", (64,), 1))


def test_a_study_of_another_size_is_refused(tmp_path):
    plan(out=tmp_path, models={}).claim()
    plan(out=tmp_path, name="other", subjects={"amg": {"mitigation": "amg"}}).claim()
    with pytest.raises(ValueError, match="--out .* count is 1000 there and 200 here"):
        plan(out=tmp_path, count=200).claim()
    with pytest.raises(ValueError, match="options.train"):
        plan(out=tmp_path, options=CommandOptions(train={"data.batch_size": 5})).claim()
    for damaged in ("3", '{"models": 3}', "{"):
        (tmp_path / "study.json").write_text(damaged)
        with pytest.raises(ValueError, match="study.json is n"):
            plan(out=tmp_path).claim()


def test_models_may_be_added_and_the_way_to_run_may_change(tmp_path):
    begun = {"wide": {"model.network.layers_per_block": 2}}
    plan(out=tmp_path, models=begun).claim()
    plan(out=tmp_path, models={"deep": {"model.network.layers_per_block": 9}}).claim()
    plan(out=tmp_path, models={**begun, "other": {}}).claim()
    for changed in ("wide", "deep"):
        with pytest.raises(ValueError, match=f"--out .* models.{changed}"):
            plan(out=tmp_path, models={changed: {"model.network.layers_per_block": 3}}).claim()
    how = CommandOptions(
        train={"trainer.logger": True, "trainer.devices": 2, "trainer.enable_progress_bar": True},
        sample={"batch_size": 7, "trainer.devices": 2},
        evaluate={"batch_size": 7},
    )
    plan(out=tmp_path, models={}, options=how).claim()
    plan(out=tmp_path, models={"wide": {**begun["wide"], "trainer.logger.name": "x"}}).claim()
    plan(out=tmp_path, models={}).claim()
    with pytest.raises(ValueError, match="options.sample"):
        plan(out=tmp_path, models={}, options=CommandOptions(sample={"steps": 7})).claim()


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("index", {"extractor": {"path": "missing"}}),
        ("sample", {"decoder": "missing"}),
        ("sample", {"prompts.file": "missing"}),
        ("evaluate", {"clip": "missing"}),
        ("evaluate", {"second_embedding": "missing"}),
    ],
)
def test_what_the_last_commands_need_is_looked_for_first(tmp_path, monkeypatch, command, given):
    monkeypatch.setattr("memfree.study.running.run_stages", None)
    monkeypatch.setattr(GridPlan, "check", lambda plan: None)
    with pytest.raises(FileNotFoundError, match=f"--options.{command}.*missing"):
        study(
            "trial",
            [Grid(factor=[2])],
            SUBJECTS,
            tmp_path / "out",
            options=CommandOptions(**{command: given}),
        )
    assert list(tmp_path.iterdir()) == []


def test_every_input_is_an_option_of_its_command():
    for command, names in INPUTS.items():
        parser = entry.parser_of(entry.load(entry.COMMANDS[command]), command)
        assert {f"--{name}" for name in names} <= {*options_of(parser)}
