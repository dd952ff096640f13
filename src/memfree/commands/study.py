"""``memfree study``: run a plan, a grid of configurations or a text-to-image one; tabulate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.text import Text

from memfree.console import plain_console
from memfree.data.options import PromptSet
from memfree.folders.lock import ALL, WHOLE, one_at_a_time, part_of
from memfree.study.grid import Grid
from memfree.study.plan import CommandOptions, GridPlan, Options, Plan, StudySource, Subjects
from memfree.study.running import CellRun, plan_size
from memfree.study.text_plan import Counts, TextPlan, Training

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

    Each cell of the grids is one model: prepared, indexed, trained, sampled for each subject from
    the same noise, and evaluated; cells share common work. A stopped study resumes. Of processes
    that share the cells, the one that finds all finished writes the tables. For a text-to-image
    plan (training, counts, prompt_sets or noise_seed) see memfree study PLAN.yaml --help.

    Args:
        name: of the study; its results are NAME.csv, .parquet, .md, .png and .html in out, and
            NAME-against-oracle.png where several factors have an oracle.
        grids: which models; a union of grids.
        subjects: ways to sample, by name: a mitigation and its options.
        out: folder for all data sets, models, samples and results; studies of the same numbers may
            share it. Its config.yaml and manifest.json are of the study summarised last.
        training_seeds: each draws its own split, repeated images, weights and noise.
        source: of the images, see memfree prepare.
        duplicated: training images that are repeated; of a ladder, those of each factor.
        steps: optimizer steps of a model.
        count: samples of a subject.
        guidance_scale: classifier-free guidance scale of models that are told a label.
        oracle: compare with training on the deduplicated images, at equal steps and equal epochs.
        models: networks of the grid, by name: options of train.py. An existing study accepts more.
        options: further options of the commands, except those that the study sets itself.
        shared_data: whether conditionings that change no label share a data set, or have one each.
        part: all; as 3/8 the third of eight parts of the cells, for concurrent jobs; or none, to
            tabulate what is finished.
        dry_run: check and print the commands, their number and how long they may take, and stop.
    """
    from memfree.study.results import summarise

    plan = GridPlan(
        name,
        out,
        subjects,
        grids,
        training_seeds,
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
    _run(plan, part, dry_run, lambda console: summarise(plan, console))


def text_study(
    name: str,
    subjects: Subjects,
    out: Path = Path("runs/emoji_study"),
    training: Training = Training(),  # noqa: B008 - read only; --help shows it
    counts: Counts = Counts(),  # noqa: B008
    prompt_sets: list[PromptSet] = ["duplicated", "other", "unseen"],  # noqa: B006
    oracle: bool = True,
    steps: PositiveInt = 25,
    guidance_scale: float = 3.0,
    batch_size: PositiveInt = 50,
    noise_seed: NonNegativeInt = 2000,
    part: str = ALL,
    dry_run: bool = False,
) -> None:
    """Train a small text-to-image model with repeated images, sample it in many ways, and compare.

    Without downloads, trains a Stable Diffusion on captioned emoji, two embeddings (one guides,
    one judges) and a CLIP. All subjects start from the same noise. Copies are judged by the guiding
    measure, by pixels, and by the second embedding. A stopped study resumes.

    Args:
        name: of the study; its results are NAME.csv, .parquet, .md, .png, -rows.png, and, if a
            subject is called none, -detection.png.
        subjects: ways to sample, by name: a mitigation and its options; and at_most, for
            subjects too slow, or too unimportant, for all samples of a prompt set.
        out: folder for everything; studies of the same data share it.
        training: the model.
        counts: samples by prompt set.
        prompt_sets: which of them.
        oracle: also the same network trained on the images without repetitions.
        steps: denoising steps (DDIM).
        guidance_scale: of classifier-free guidance.
        batch_size: samples drawn together.
        noise_seed: of the samples; use others for studies that choose settings.
        part: all; a part of the prompt sets, such as 1/3; or none, to tabulate what is finished.
        dry_run: check and print the commands, their number and how long they may take, and stop.

    Raises:
        FileNotFoundError: the working directory is not the repository's.
    """
    from memfree.study.text_results import summarise

    plan = TextPlan(
        name,
        out,
        subjects,
        training,
        counts,
        prompt_sets,
        oracle,
        steps,
        guidance_scale,
        batch_size,
        noise_seed,
    )
    _run(plan, part, dry_run, lambda console: summarise(plan, console))


def _run(plan: Plan, part: str, dry_run: bool, summarise: Callable[[Console], object]) -> None:
    plan.check()
    cells = plan.cells()
    work = WHOLE if part == NONE else part_of(part)
    chosen = [] if part == NONE else work.share(cells)
    console = plain_console()
    if dry_run:
        _print(plan, chosen, console)
        return
    if chosen:
        plan.check_inputs()
    plan.claim()
    taken: dict[str, float] = {}
    for number, cell in enumerate(chosen, 1):
        _title(number, chosen, console)
        run = CellRun(plan, cell)
        if not run.finished:
            run.run(console, taken)
    if not work.whole and (left := [cell for cell in cells if not CellRun(plan, cell).finished]):
        console.print(f"part {part} is done; {len(left)} cells of others are not")
        return
    with one_at_a_time(plan.out, work):
        summarise(console)


def _title(number: int, cells: Sequence[Any], console: Console) -> None:
    text = f"cell {number} of {len(cells)}: {cells[number - 1]}"
    console.rule(Text(text, style="bold"))


def _print(plan: Plan, cells: Sequence[Any], console: Console) -> None:
    printed: set[str] = set()
    for number, cell in enumerate(cells, 1):
        _title(number, cells, console)
        lines = dict.fromkeys(stage.line() for stage in plan.stages(cell))
        new = [line for line in lines if line not in printed]
        printed.update(new)
        console.print("\n".join(new), markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.rule()
    console.print(plan_size([CellRun(plan, cell) for cell in cells]), markup=False, soft_wrap=True)
