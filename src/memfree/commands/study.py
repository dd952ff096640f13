"""``memfree study``: run a grid of configurations and tabulate it."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.text import Text

from memfree.console import plain_console
from memfree.folders.lock import ALL, WHOLE, one_at_a_time, part_of
from memfree.folders.manifest import save_config, write_manifest
from memfree.study.grid import Cell, Grid, expand
from memfree.study.plan import (
    CommandOptions,
    Options,
    Plan,
    StudySource,
    Subjects,
    check_commands,
    check_inputs,
    check_names,
    check_options,
    claim,
)
from memfree.study.running import CellRun, plan_size

NONE = "none"
UNGUIDED: Subjects = {"unguided": {"mitigation": "none"}}


def study(
    name: str,
    grids: list[Grid],
    subjects: Subjects = UNGUIDED,
    out: Path = Path("runs/study"),
    training_seeds: list[NonNegativeInt] = [1, 2, 3],  # noqa: B006 - read only
    source: StudySource = "digits",
    duplicated: PositiveInt = 16,
    steps: PositiveInt = 1500,
    count: PositiveInt = 1000,
    guidance_scale: float = 2.0,
    oracle: bool = False,
    models: dict[str, Options] = {},  # noqa: B006
    options: CommandOptions = CommandOptions(),  # noqa: B008
    shared_data: bool = True,
    part: str = ALL,
    dry_run: bool = False,
) -> None:
    """Train models on repeated images, sample them in many ways, and compare.

    Every cell of the grids is one trained model: it is prepared, indexed, trained, sampled once for
    each subject from the same noise, and evaluated. What cells have in common, a data set for
    instance, is made once. Folders have fixed names, and what is finished is not done again, so
    that a study goes on where it stopped. Several processes may each take a part of the cells;
    the one that finds all of them finished writes the tables.

    Args:
        name: of the study; its results are NAME.csv, .parquet, .md, .png and .html in out, and
            NAME-against-oracle.png where several factors have an oracle.
        grids: which models; a union of grids.
        subjects: ways to sample, by name: a mitigation and its options.
        out: folder for all data sets, models, samples and results; studies of the same numbers may
            share it. Its config.yaml and manifest.json are of the study that was summarised last.
        training_seeds: each draws its own split, repeated images, weights and noise.
        source: of the images, see memfree prepare.
        duplicated: training images that are repeated; of a ladder, those of each factor.
        steps: optimizer steps of a model.
        count: samples of a subject.
        guidance_scale: classifier-free guidance scale of models that are told a label.
        oracle: compare with the same network trained on the deduplicated images, at equal steps and
            at equal epochs.
        models: networks of the grid, by name: options of train.py. More may be added to a study
            that is there.
        options: further options of the commands, but those that the study sets itself.
        shared_data: whether conditionings that change no label share a data set; false: each
            prepares its own.
        part: all; a part of the cells as 3/8 (the third of eight), for processes or jobs that do
            a study together; or none, to tabulate what is finished.
        dry_run: check and print the commands, how many they are and how long they may take, and
            stop.

    Raises:
        ValueError: an option is wrong, or out holds a study of other numbers.
    """
    from memfree.study.results import summarise

    plan = Plan(
        name,
        out,
        subjects,
        source,
        duplicated,
        steps,
        count,
        guidance_scale,
        oracle,
        shared_data,
        models,
        options,
    )
    check_names(plan, grids)
    check_options(plan)
    every = expand(grids, training_seeds)
    work = WHOLE if part == NONE else part_of(part)
    chosen = [] if part == NONE else work.share(every)
    check_commands(plan, every)
    console = plain_console()
    if dry_run:
        _print(plan, chosen, console)
        return
    if chosen:
        check_inputs(plan)
    claim(plan)
    for number, cell in enumerate(chosen, 1):
        console.rule(Text(f"cell {number} of {len(chosen)}: {cell.name}", style="bold"))
        run = CellRun(plan, cell)
        if not run.finished:
            run.run(console)
    if not work.whole and (left := [one for one in every if not CellRun(plan, one).finished]):
        console.print(f"part {part} is done; {len(left)} cells of others are not")
        return
    with one_at_a_time(out, work):
        summarise(plan, every, console)
        save_config(out)
        write_manifest(out, "study", name=name, cells=[cell.name for cell in every])


def _print(plan: Plan, cells: list[Cell], console: Console) -> None:
    """The plan: each command where it is run first, and the size of it all."""
    printed: set[str] = set()
    for number, cell in enumerate(cells, 1):
        console.rule(Text(f"cell {number} of {len(cells)}: {cell.name}", style="bold"))
        lines = [stage.line() for stage in plan.stages(cell)]
        new = [line for line in dict.fromkeys(lines) if line not in printed]
        printed.update(new)
        console.print("\n".join(new), markup=False, highlight=False, soft_wrap=True)
    console.rule()
    console.print(plan_size([CellRun(plan, cell) for cell in cells]), markup=False, soft_wrap=True)
