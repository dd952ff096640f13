"""What a study refuses before it makes anything: names, and options of its commands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memfree.stages import Stage
from memfree.study.cells import DEFAULT_MODEL, Cell, Grid
from memfree.study.labels import LADDER_LABEL
from memfree.study.plan import Options, Plan

_NAME = re.compile(r"[\w-]+")
_REPEATED = "factor and ladder of --grids and --duplicated"
OWN = {
    "prepare": {
        "out": "--out",
        "source": "--source",
        "seed": "--training_seeds",
        "limit": "size of --grids",
        "labels": "conditioning of --grids",
        "plan.images": _REPEATED,
        "plan.factor": _REPEATED,
        "plan.ladder": _REPEATED,
        "plan.images_per_factor": _REPEATED,
        "plan.seed": "--training_seeds",
    },
    "index": {"dataset": "--out", "out": "--out"},
    "train": {
        "data.path": "--out",
        "out": "--out",
        "model.class_conditional": "conditioning of --grids",
        "trainer.max_steps": "--steps, or steps of --grids",
        "seed": "--training_seeds",
    },
    "sample": {
        "model": "--grids",
        "index": "--out",
        "out": "--out",
        "count": "--count",
        "guidance_scale": "--guidance_scale",
        "guidance.mitigation": "--subjects",
        "seed": "--training_seeds",
    },
    "evaluate": {
        "dataset": "--out",
        "index": "--out",
        "samples": "--subjects",
        "other_data": "--oracle",
        "out": "--out",
    },
}
"""Options of the commands that the study gives a value of its own, and what it takes that from."""
INPUTS = {
    "index": ("extractor.path",),
    "sample": ("latents", "decoder", "prompts.file", "prompts.dataset"),
    "evaluate": ("clip", "second_embedding"),
}
"""Options of the commands that name something that must be there before a study begins."""
_ALSO = {"train": " or --models", "sample": " or --subjects"}


def check_names(plan: Plan, grids: Sequence[Grid]) -> None:
    """Refuse names that cannot be folders or mean something else, and models not described.

    Raises:
        ValueError: names the option.
    """
    from memfree.evaluation.metrics import HELDOUT
    from memfree.study.values import ORACLES

    for option, names in (
        ("name", [plan.name]),
        ("subjects", [*plan.subjects]),
        ("models", [*plan.models]),
    ):
        for one in names:
            if not _NAME.fullmatch(one):
                raise ValueError(f"--{option}: use letters, digits, - and _ for the name {one!r}")
    if not plan.subjects:
        raise ValueError("--subjects is empty: name at least one way to sample")
    if HELDOUT in plan.subjects:
        raise ValueError(f"--subjects: {HELDOUT} are the images that every study measures as well")
    if plan.oracle and ORACLES.keys() & plan.subjects.keys():
        raise ValueError("--subjects: oracle_steps and oracle_epochs are the models of --oracle")
    if LADDER_LABEL in plan.models:
        raise ValueError(f"--models: {LADDER_LABEL!r} is what tables call data of several factors")
    for model in (one for grid in grids for one in grid.model):
        if model != DEFAULT_MODEL and model not in plan.models:
            raise ValueError(f"--grids: there is no model {model!r} below --models")


def check_options(plan: Plan) -> None:
    """Refuse options of commands that would undo what the study gives them.

    Raises:
        ValueError: names the option, and what to use.
    """
    for command, own in OWN.items():
        _check_own(f"--options.{command}", getattr(plan.options, command), own)
    for model, options in plan.models.items():
        _check_own(f"--models.{model}", options, OWN["train"])


def _check_own(where: str, options: Options, own: dict[str, str]) -> None:
    for given in options:
        for name, instead in own.items():
            # A group of options as well: {"trainer": {"max_steps": 5}}.
            if given == name or given.startswith(f"{name}.") or name.startswith(f"{given}."):
                raise ValueError(f"{where}: the study sets {name} itself; use {instead}")


def check_inputs(plan: Plan) -> None:
    """Refuse files and folders that are missing, which the last commands would find after hours.

    Raises:
        FileNotFoundError: names the option.
    """
    for command, names in INPUTS.items():
        for name, value in _flat(getattr(plan.options, command)):
            if name in names and value is not None and not Path(value).exists():
                raise FileNotFoundError(f"--options.{command}: there is no {name} {value}")


def _flat(options: Options, before: str = "") -> Iterator[tuple[str, Any]]:
    """Options by dotted names, however they are nested."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def check_commands(plan: Plan, cells: Sequence[Cell]) -> None:
    """Parse every command with its own parser, so that no option is refused after hours.

    Raises:
        ValueError: names the options of the study that the command's are from.
    """
    checked = set()
    for stage in (stage for cell in cells for stage in plan.stages(cell)):
        if (kind := _without_paths(stage)) in checked:
            continue
        checked.add(kind)
        try:
            stage.check()
        except ValueError as error:
            where = f"--options.{stage.command}{_ALSO.get(stage.command, '')}"
            raise ValueError(f"{where}: {error}") from error


def _without_paths(stage: Stage) -> tuple[str, str]:
    """What a parser can tell commands apart by: the folders that the study sets are all alike."""
    options = {
        name: "" if isinstance(value, Path) else value for name, value in stage.options.items()
    }
    return stage.command, str(options)
