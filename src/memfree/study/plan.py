"""Plan of a study: the commands of every cell, checked before the first one runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memfree.cli.stages import Stage
from memfree.folders.atomic import write_json
from memfree.folders.claim import check_kind, first_difference, or_another, refuse_other
from memfree.folders.untrusted import read_json
from memfree.guidance.options import sampling_options
from memfree.study.grid import DEFAULT_MODEL, LADDER_LABEL, Cell, Grid

Options = dict[str, Any]
"""Options of a command by dotted name, without the dashes."""
Subjects = dict[str, Options]
"""Mitigations and their options, as {"reject_3": {"mitigation": "reject", "budget": 3}}."""
StudySource = Literal["digits", "cifar10", "folder", "shards"]

TRAINING_IMAGES = {"digits": 500, "cifar10": 50_000}
"""Images that `memfree prepare` trains on by default."""
NOISE_SEED = 1000
"""Noise seeds of studies are this plus the training seed: no other run uses them."""
CONFIG = "config"


@dataclass(frozen=True)
class CommandOptions:
    """Further options of the commands that a study runs, as {"parts.calibration": 600}."""

    prepare: Options = field(default_factory=dict)
    """Of memfree prepare."""
    index: Options = field(default_factory=dict)
    """Of memfree index."""
    train: Options = field(default_factory=dict)
    """Of train.py; config names a file with the others."""
    sample: Options = field(default_factory=dict)
    """Of sample.py."""
    evaluate: Options = field(default_factory=dict)
    """Of memfree evaluate."""


@dataclass(frozen=True)
class Plan:
    """The commands of a study; see :func:`memfree.commands.study`."""

    name: str
    out: Path
    subjects: Subjects
    source: StudySource = "digits"
    duplicated: int = 16
    steps: int = 1500
    count: int = 1000
    guidance_scale: float = 2.0
    oracle: bool = False
    shared_data: bool = True
    models: dict[str, Options] = field(default_factory=dict)
    options: CommandOptions = CommandOptions()

    def cell(self, cell: Cell) -> Path:
        """Folder of a cell's model, samples and figures."""
        return self.out / cell.name

    def data(self, cell: Cell) -> Path:
        """Folder of a cell's data set and of its index, which cells may share."""
        if self.shared_data:
            return self.out / "data" / cell.data
        return self.cell(replace(cell, model=DEFAULT_MODEL, steps=0))

    def evaluation(self, cell: Cell) -> Path:
        """Folder of the cell's figures."""
        return self.cell(cell) / f"evaluation-{self.name}"

    def samples(self, cell: Cell) -> dict[str, Path]:
        """Sample folders of the cell's subjects and of the models that it is compared with."""
        drawn = {one: self.cell(cell) / "samples" / one for one in self.subjects}
        for label, steps in self._oracles(cell).items():
            model = self._oracle_model(cell, steps)
            drawn[label] = model.with_name(f"samples-of-{model.name}")
        return drawn

    def stages(self, cell: Cell) -> list[Stage]:
        """The commands of one cell, in order: it needs no other cell.

        Cells may have commands in common; who comes second finds them done.
        """
        data, model = self.data(cell), self.cell(cell) / "model"
        drawn, oracles = self.samples(cell), self._oracles(cell)
        stages = [
            self._prepare(cell),
            Stage("index", {"dataset": data / "data", "out": data / "index", **self.options.index}),
            self._train(cell, model, self._steps(cell)),
        ]
        for subject, options in self.subjects.items():
            guided = {"index": data / "index", **sampling_options(options)}
            stages.append(self._sample(cell, model, drawn[subject], guided))
        unique = replace(cell, factors=(1,))
        for label, steps in oracles.items():
            model = self._oracle_model(cell, steps)
            stages += [
                self._prepare(unique),
                self._train(unique, model, steps),
                self._sample(unique, model, drawn[label], {}),
            ]
        named = {f"samples.{subject}": path for subject, path in drawn.items()}
        other_data = {"other_data": list(oracles)} if oracles else {}
        to = {"out": self.evaluation(cell), **self.options.evaluate}
        inputs = {"dataset": data / "data", "index": data / "index"}
        return [*stages, Stage("evaluate", {**inputs, **named, **other_data, **to})]

    def _steps(self, cell: Cell) -> int:
        return cell.steps or self.steps

    def _oracles(self, cell: Cell) -> dict[str, int]:
        """Trainings on the deduplicated data that a cell is compared with, and their steps."""
        if not self.oracle or max(cell.factors) == 1:
            return {}
        return {"oracle_steps": self._steps(cell), "oracle_epochs": self.equal_epochs(cell)}

    def _oracle_model(self, cell: Cell, steps: int) -> Path:
        folder = self.cell(replace(cell, factors=(1,)))
        return folder / ("model" if steps == self._steps(cell) else f"model-{steps}-steps")

    def equal_epochs(self, cell: Cell) -> int:
        """Steps in which the deduplicated set is seen as often as the other's records were.

        Raises:
            ValueError: the number of training images is not known.
        """
        unique = cell.size or self.options.prepare.get("parts.train")
        unique = unique or TRAINING_IMAGES.get(self.source)
        if not isinstance(unique, int) or unique < 1:
            raise ValueError(
                "--oracle needs the number of training images: give --options.prepare with "
                '{"parts.train": NUMBER}'
            )
        copies = sum(factor - 1 for factor in cell.factors)
        return max(1, round(self._steps(cell) * unique / (unique + self.duplicated * copies)))

    def _prepare(self, cell: Cell) -> Stage:
        options: Options = {
            "out": self.data(cell) / "data",
            "source": self.source,
            "seed": cell.seed,
        }
        if cell.size:
            options["limit"] = cell.size
        if cell.conditioning in ("random_labels", "unique_labels"):
            options["labels"] = cell.conditioning.removesuffix("_labels")
        if max(cell.factors) > 1:
            how: Options = {"plan.images": self.duplicated, "plan.factor": cell.factors[0]}
            if len(cell.factors) > 1:
                ladder = list(cell.factors)
                how = {"plan.ladder": ladder, "plan.images_per_factor": self.duplicated}
            options |= {**how, "plan.choice": "balanced", "plan.seed": cell.seed}
        return Stage("prepare", {**options, **self.options.prepare})

    def _train(self, cell: Cell, model: Path, steps: int) -> Stage:
        given = {**self.options.train, **self.models.get(cell.model, {})}
        first = {CONFIG: given.pop(CONFIG)} if CONFIG in given else {}
        return Stage(
            "train",
            {
                **first,  # options that stand behind a file win over it
                "data.path": self.data(cell) / "data",
                "out": model,
                "model.class_conditional": cell.conditioning != "unconditional",
                "trainer.max_steps": steps,
                "trainer.devices": 1,
                "trainer.sample_grid_every_n_steps": 0,
                "trainer.enable_progress_bar": False,
                "seed": cell.seed,
                **given,
            },
        )

    def _sample(self, cell: Cell, model: Path, out: Path, guided: Options) -> Stage:
        conditional = cell.conditioning != "unconditional"
        return Stage(
            "sample",
            {
                "model": model,
                "out": out,
                "count": self.count,
                "batch_size": 250,
                "scheduler": "ddpm",
                "guidance_scale": self.guidance_scale if conditional else 1.0,
                "seed": NOISE_SEED + cell.seed,
                "trainer.devices": 1,
                **guided,
                **self.options.sample,
            },
        )


NUMBERS = ("source", "duplicated", "steps", "count", "guidance_scale", "shared_data")
"""Options of a study that all models and figures of its folder have in common."""
_HOW = ("batch_size", "trainer.devices", "trainer.enable_progress_bar", "trainer.logger")
"""Options of commands, and what is below them, that change how something is made, not what: the
commands decide whether they take what is there. The batch size of training is data.batch_size."""


def claim(plan: Plan) -> None:
    """Refuse a folder that holds a study of another size; its figures would be taken for ours.

    Models are compared by name: further ones may join those that are there.

    Raises:
        ValueError: ``out`` was begun with other numbers, or holds something else.
    """
    check_kind(plan.out, "study")
    asked = _asked(plan)
    path = plan.out / "study.json"
    with or_another():
        begun = read_json(path) if path.is_file() else {}
        if not isinstance(begun, dict) or not isinstance(begun.get("models", {}), dict):
            raise ValueError(f"{path} is no study's file")
    models = begun.get("models", {})
    # Studies that were begun before an option existed had its only value.
    found = {option: _what(begun.get(option, value)) for option, value in asked.items()}
    found["models"] = {
        name: _what(models.get(name, options)) for name, options in asked["models"].items()
    }
    refuse_other(plan.out, first_difference(found, asked))
    both = {**begun, **asked, "models": {**models, **asked["models"]}}
    if both != begun:
        write_json(path, both)


def _asked(plan: Plan) -> dict[str, Any]:
    asked = {name: getattr(plan, name) for name in NUMBERS}
    asked["models"] = {name: _what(options) for name, options in plan.models.items()}
    for command, options in asdict(plan.options).items():
        asked[f"options.{command}"] = _what(options)
    asked = json.loads(json.dumps(asked, default=str))
    assert isinstance(asked, dict)
    return asked


def _what(options: Any) -> Any:
    """Options of a command without those of ``_HOW``, any other value as it is."""
    if not isinstance(options, dict):
        return options
    kept: Options = {
        name: value
        for name, value in options.items()
        if not any(name == how or name.startswith(f"{how}.") for how in _HOW)
    }
    return kept


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
        "mitigation": "--subjects",
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
    from memfree.study.metrics_shown import ORACLES

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
