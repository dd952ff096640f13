"""What a study does to each of its cells, as commands with deterministic folders."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memfree.stages import Stage
from memfree.study.cells import DEFAULT_MODEL, Cell

Options = dict[str, Any]
"""Options of a command by dotted name, without the dashes."""
Subjects = dict[str, Options]
"""Options of sample.py below --guidance by subject, as {"reject_3": {"mitigation": "reject"}}."""
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
    """The commands of a study; see :func:`memfree.study.study`."""

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
            guided = {f"guidance.{key}": value for key, value in options.items()}
            guided = {"index": data / "index", **guided}
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
