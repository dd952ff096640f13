"""Plans of studies: the commands of every cell, checked before the first one runs."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memfree.cli.stages import Stage
from memfree.folders.atomic import write_json
from memfree.folders.claim import check_kind, first_difference, or_another, refuse_other
from memfree.folders.untrusted import read_json
from memfree.guidance.options import sampling_options
from memfree.study.grid import DEFAULT_MODEL, LADDER_LABEL, ORACLES, Cell, Grid, expand

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
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Plan(ABC):
    """What ``memfree study`` runs: commands, in cells that several processes may share."""

    name: str
    out: Path
    subjects: Subjects

    def check(self) -> None:
        """Refuse what would fail after hours; nothing is written.

        Raises:
            ValueError: names the option.
        """
        check_names("name", [self.name])
        check_names("subjects", self.subjects)
        if not self.subjects:
            raise ValueError("--subjects is empty: name at least one way to sample")

    @abstractmethod
    def check_inputs(self) -> None:
        """Refuse missing files that the commands read.

        Raises:
            FileNotFoundError: names the option, or the file.
        """

    def claim(self) -> None:  # noqa: B027 - not every kind of plan has numbers to compare
        """Refuse a folder that holds something else."""

    @abstractmethod
    def cells(self) -> Sequence[Any]:
        """The cells; ``str(cell)`` is the name of one."""

    @abstractmethod
    def stages(self, cell: Any) -> list[Stage]:
        """The commands of one cell, in order: it needs no other cell.

        Cells may have commands in common; whoever comes second finds them done.
        """

    @abstractmethod
    def record(self, cell: Any) -> Path:
        """The file that lists the finished commands of a cell."""

    @abstractmethod
    def evaluations(self, cell: Any) -> list[Path]:
        """Evaluation folders of a cell."""

    def evaluated(self, cell: Any) -> bool:
        """Whether all metrics of a cell are there."""
        return all((folder / "manifest.json").is_file() for folder in self.evaluations(cell))


def check_names(option: str, names: Iterable[str]) -> None:
    """Refuse names that cannot be folders."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"--{option}: use letters, digits, - and _ for the name {name!r}")


def check_stage(stage: Stage, where: str) -> None:
    """Parse a command with its own parser; ``where`` its options come from, as --subjects."""
    try:
        stage.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
class GridPlan(Plan):
    """Models of a grid, a cell each; see :func:`memfree.commands.study.study`."""

    grids: Sequence[Grid] = ()
    training_seeds: Sequence[int] = (1, 2, 3)
    source: StudySource = "digits"
    duplicated: int = 16
    steps: int = 1500
    count: int = 1000
    guidance_scale: float = 2.0
    oracle: bool = False
    shared_data: bool = True
    models: dict[str, Options] = field(default_factory=dict)
    options: CommandOptions = CommandOptions()

    def cells(self) -> list[Cell]:
        """One for each model and training seed."""
        return expand(self.grids, self.training_seeds)

    def folder(self, cell: Cell) -> Path:
        """Folder of a cell's model, samples and evaluation."""
        return self.out / cell.name

    def record(self, cell: Cell) -> Path:
        """``CELL/study-NAME.json``."""
        return self.folder(cell) / f"study-{self.name}.json"

    def evaluation(self, cell: Cell) -> Path:
        """Folder of the cell's metrics."""
        return self.folder(cell) / f"evaluation-{self.name}"

    def evaluations(self, cell: Cell) -> list[Path]:
        """Its only one."""
        return [self.evaluation(cell)]

    def data(self, cell: Cell) -> Path:
        """Folder of a cell's data set and of its index, which cells may share."""
        if self.shared_data:
            return self.out / "data" / cell.data
        return self.folder(replace(cell, model=DEFAULT_MODEL, steps=0))

    def samples(self, cell: Cell) -> dict[str, Path]:
        """Sample folders of the cell's subjects and of the models that it is compared with."""
        drawn = {subject: self.folder(cell) / "samples" / subject for subject in self.subjects}
        for label, steps in self._oracles(cell).items():
            model = self._oracle_model(cell, steps)
            drawn[label] = model.with_name(f"samples-of-{model.name}")
        return drawn

    def stages(self, cell: Cell) -> list[Stage]:
        """Prepare, index, train, sample each subject, evaluate; the same for its oracles."""
        data, model = self.data(cell), self.folder(cell) / "model"
        inputs = {"dataset": data / "data", "index": data / "index"}
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
        return [*stages, Stage("evaluate", {**inputs, **named, **other_data, **to})]

    def _steps(self, cell: Cell) -> int:
        return cell.steps or self.steps

    def _oracles(self, cell: Cell) -> dict[str, int]:
        """Trainings on the deduplicated data that a cell is compared with, and their steps."""
        if not self.oracle or max(cell.factors) == 1:
            return {}
        return {"oracle_steps": self._steps(cell), "oracle_epochs": self.equal_epochs(cell)}

    def _oracle_model(self, cell: Cell, steps: int) -> Path:
        folder = self.folder(replace(cell, factors=(1,)))
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
                **first,  # later options win over the file
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

    def check(self) -> None:
        """Refuse names with another meaning, options that the study sets, and wrong options."""
        from memfree.evaluation.metrics import HELDOUT

        super().check()
        check_names("models", self.models)
        if HELDOUT in self.subjects:
            raise ValueError(f"--subjects: {HELDOUT} are the images that every study also measures")
        if self.oracle and ORACLES.keys() & self.subjects.keys():
            raise ValueError("--subjects: oracle_steps and oracle_epochs are models of --oracle")
        if LADDER_LABEL in self.models:
            raise ValueError(f"--models: {LADDER_LABEL!r} is what tables call data of many factors")
        for model in (name for grid in self.grids for name in grid.model):
            if model != DEFAULT_MODEL and model not in self.models:
                raise ValueError(f"--grids: there is no model {model!r} below --models")
        for command, own in OWN.items():
            _check_own(f"--options.{command}", getattr(self.options, command), own)
        for model, options in self.models.items():
            _check_own(f"--models.{model}", options, OWN["train"])
        different: dict[str, Stage] = {}  # but for their paths, which the study sets
        for stage in (stage for cell in self.cells() for stage in self.stages(cell)):
            kept = {key: "" if isinstance(v, Path) else v for key, v in stage.options.items()}
            different.setdefault(f"{stage.command} {kept}", stage)
        for stage in different.values():
            check_stage(stage, f"--options.{stage.command}{_ALSO.get(stage.command, '')}")

    def check_inputs(self) -> None:
        """Look for the files of ``INPUTS``."""
        for command, names in INPUTS.items():
            for name, value in _flat(getattr(self.options, command)):
                if name in names and value is not None and not Path(value).exists():
                    raise FileNotFoundError(f"--options.{command}: there is no {name} {value}")

    def claim(self) -> None:
        """Refuse a folder that holds a study of other numbers, and note those of this one.

        Models are compared by name: further ones may join those of the folder.

        Raises:
            ValueError: ``out`` was begun with other numbers, or holds something else.
        """
        check_kind(self.out, "study")
        wanted = self._numbers()
        path = self.out / "study.json"
        with or_another():
            begun = read_json(path) if path.is_file() else {}
            if not isinstance(begun, dict) or not isinstance(begun.get("models", {}), dict):
                raise ValueError(f"{path} is not a study's file")
        models = begun.get("models", {})
        # Studies that were begun before an option existed had its only value.
        found = {option: _what(begun.get(option, value)) for option, value in wanted.items()}
        found["models"] = {
            name: _what(models.get(name, options)) for name, options in wanted["models"].items()
        }
        refuse_other(self.out, first_difference(found, wanted))
        both = {**begun, **wanted, "models": {**models, **wanted["models"]}}
        if both != begun:
            write_json(path, both)

    def _numbers(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in NUMBERS}
        numbers["models"] = {name: _what(options) for name, options in self.models.items()}
        for command, options in asdict(self.options).items():
            numbers[f"options.{command}"] = _what(options)
        return dict(json.loads(json.dumps(numbers, default=str)))


NUMBERS = ("source", "duplicated", "steps", "count", "guidance_scale", "shared_data")
"""Options that all models and metrics of a study's folder have in common."""
_HOW = ("batch_size", "trainer.devices", "trainer.enable_progress_bar", "trainer.logger")
"""Options, and what is below them, that change how something is made, not what: the commands
decide whether they accept what exists. The batch size of training is data.batch_size."""


def _what(options: Any) -> Any:
    """Options of a command without those of ``_HOW``, any other value as it is."""
    if not isinstance(options, dict):
        return options
    return {
        name: value
        for name, value in options.items()
        if not any(name == how or name.startswith(f"{how}.") for how in _HOW)
    }


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
        "mitigation.name": "--subjects",
        "allow_code": "sample.py on the command line",
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
"""Options of the commands that the study sets itself, and the study's option to use instead."""
INPUTS = {
    "index": ("extractor.path",),
    "sample": ("latents", "decoder", "prompts.file", "prompts.dataset"),
    "evaluate": ("clip", "second_embedding"),
}
"""Options of the commands that name something that must exist before a study begins."""
_ALSO = {"train": " or --models", "sample": " or --subjects"}


def _check_own(where: str, options: Options, own: dict[str, str]) -> None:
    for given in options:
        for name, instead in own.items():
            # A group of options as well: {"trainer": {"max_steps": 5}}.
            if given == name or given.startswith(f"{name}.") or name.startswith(f"{given}."):
                raise ValueError(f"{where}: the study sets {name} itself; use {instead}")


def _flat(options: Options, before: str = "") -> Iterator[tuple[str, Any]]:
    """Options by dotted names, however they are nested."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
