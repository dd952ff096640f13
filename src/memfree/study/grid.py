"""Command `memfree study`: the same models sampled in many ways, over several training seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from memfree.manifest import check_kind, write_json, write_manifest
from memfree.resolved import save_config
from memfree.stages import Stage, run_stages
from memfree.study.plot import write_dose_response
from memfree.study.results import summarise
from memfree.untrusted import read_json

Conditioning = Literal["unconditional", "class"]

DIGITS_TRAIN = 500
"""Training images that `memfree prepare --source digits` deals out."""
NOISE_SEED = 1000
"""Noise seeds of studies are this plus the training seed: no other run uses them."""

NO_CORRECTION = {"guidance.mitigation": "amg", "guidance.final_correction": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "unguided": {"guidance.mitigation": "none"},
    "amg": {"guidance.mitigation": "amg"},
    "multiplicity": {"guidance.mitigation": "multiplicity"},
    "both": {"guidance.mitigation": "both"},
    "reject": {"guidance.mitigation": "reject", "guidance.budget": 10},
    "amg_uncorrected": NO_CORRECTION,
    "no_gate": {**NO_CORRECTION, "guidance.gated": False},
    "constant_threshold": {**NO_CORRECTION, "guidance.schedule": "constant"},
    "no_spe": {**NO_CORRECTION, "guidance.c1": 0},
    "no_dup": {**NO_CORRECTION, "guidance.c2": 0},
    "no_sim": {**NO_CORRECTION, "guidance.c3": 0},
    "published_form": {
        **NO_CORRECTION,
        "guidance.gate_margin": 0,
        "guidance.max_displacement": 0,
        "guidance.start_ratio": 1.3,
    },
    "kappa_1": {"guidance.mitigation": "both", "guidance.strength": 1.0},
    "kappa_2": {"guidance.mitigation": "both", "guidance.strength": 2.0},
    "kappa_3": {"guidance.mitigation": "both", "guidance.strength": 3.0},
    "wide_gate": {"guidance.mitigation": "both", "guidance.gate_margin": 0.34},
    "weak": {"guidance.mitigation": "both", "guidance.c3": 30},
    "short_steps": {"guidance.mitigation": "both", "guidance.max_displacement": 0.25},
    "late_gate": {"guidance.mitigation": "both", "guidance.start_ratio": 1.1},
}
"""Ways to sample by name, as options of sample.py."""

SETS = {
    "oracle": ["unguided", "amg", "multiplicity", "both", "reject"],
    "ablation": [
        "unguided",
        "amg",
        "amg_uncorrected",
        "published_form",
        "no_gate",
        "constant_threshold",
        "no_spe",
        "no_dup",
        "no_sim",
    ],
    "settings": [
        "unguided",
        "amg",
        "both",
        "kappa_1",
        "kappa_2",
        "kappa_3",
        "wide_gate",
        "weak",
        "short_steps",
        "late_gate",
    ],
}
"""Variants of each study."""


@dataclass(frozen=True)
class Cell:
    """One trained model: its conditioning, its duplication, its training seed."""

    conditioning: Conditioning
    factor: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name, the same in every run."""
        return f"{self.conditioning}-x{self.factor}-seed{self.seed}"


def study(
    name: Literal["oracle", "ablation", "settings"],
    out: Path = Path("runs/study"),
    training_seeds: list[NonNegativeInt] = [1, 2, 3],  # noqa: B006 - read only
    unconditional_factors: list[PositiveInt] = [1, 4, 16, 64, 256],  # noqa: B006
    class_factors: list[PositiveInt] = [64],  # noqa: B006
    duplicated: PositiveInt = 16,
    steps: PositiveInt = 1500,
    count: PositiveInt = 1000,
    guidance_scale: float = 2.0,
    dry_run: bool = False,
) -> None:
    """Train digit models with repeated images, sample them in many ways, and compare.

    oracle: every mitigation against the same network trained on the deduplicated images, at equal
    steps and at equal epochs. ablation: AMG without its parts, one at a time. settings: the
    recommended strengths beside others, on seeds that no result is reported from. They share
    models; folders have fixed names, and what is finished is not done again, so that a study goes
    on where it stopped, and several processes may take different training seeds. Each of them
    summarises its own cells only: run the full configuration once at the end.

    Args:
        name: which study.
        out: folder for all models, samples and results; its config.yaml and manifest.json are of
            the study that was summarised last.
        training_seeds: each draws its own split, repeated images, weights and noise.
        unconditional_factors: records of a repeated image, one unconditional model each.
        class_factors: the same for class-conditional models.
        duplicated: training images that are repeated, of 500.
        steps: optimizer steps of a model.
        count: samples of a kind.
        guidance_scale: classifier-free guidance scale of the class-conditional models.
        dry_run: print the commands and stop.
    """
    console = Console()
    factors = {"unconditional": unconditional_factors, "class": class_factors}
    cells = [
        Cell("class" if kind == "class" else "unconditional", factor, seed)
        for seed in training_seeds
        for kind, several in factors.items()
        for factor in several
    ]
    plan = Plan(name, out, duplicated, steps, count, guidance_scale)
    if not dry_run:
        plan.claim()
    for number, cell in enumerate(cells, 1):
        stages = plan.stages(cell)
        console.rule(f"[bold]cell {number} of {len(cells)}: {cell.name}")
        if dry_run:
            lines = "\n".join(stage.line() for stage in stages)
            console.print(lines, markup=False, highlight=False, soft_wrap=True)
        elif not (plan.evaluation(cell) / "manifest.json").is_file():
            run_stages(stages, console)
    if not dry_run:
        values = summarise(out, name, {cell.name for cell in cells}, console)
        write_dose_response(out / f"{name}.png", values)
        save_config(out)
        write_manifest(out, "study", name=name, cells=[cell.name for cell in cells])


@dataclass(frozen=True)
class Plan:
    """What a study does to each of its cells."""

    name: str
    out: Path
    duplicated: int
    steps: int
    count: int
    guidance_scale: float

    def claim(self) -> None:
        """Refuse a folder that holds a study of another size; its figures would be taken for ours.

        Raises:
            ValueError: ``out`` was begun with other numbers, or holds something else.
        """
        check_kind(self.out, "study")
        asked = {key: value for key, value in asdict(self).items() if key not in ("name", "out")}
        path = self.out / "study.json"
        if not path.is_file():
            write_json(path, asked)
            return
        begun = read_json(path)
        if not isinstance(begun, dict):
            raise ValueError(f"{path} is no study's file; choose another --out")
        for key, value in asked.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{self.out} holds a study with --{key} {begun.get(key)}, not {value}; "
                    "choose another --out"
                )

    def evaluation(self, cell: Cell) -> Path:
        """Folder of the cell's figures."""
        return self.out / cell.name / f"evaluation-{self.name}"

    def stages(self, cell: Cell) -> list[Stage]:
        """The commands of one cell, in order."""
        folder = self.out / cell.name
        data, index = folder / "data", folder / "index"
        stages = [
            self._prepare(data, cell.seed, cell.factor),
            Stage("index", {"dataset": data, "out": index}),
            self._train(data, folder / "model", cell, self.steps),
        ]
        subjects = {}
        for variant in SETS[self.name]:
            subjects[variant] = folder / "samples" / variant
            guided = {"index": index, **VARIANTS[variant]}
            stages.append(self._sample(folder / "model", subjects[variant], cell, guided))
        oracles = self._oracles(cell)
        for label, steps in oracles.items():
            unique = self.out / f"{cell.conditioning}-x1-seed{cell.seed}"
            model = unique / ("model" if steps == self.steps else f"model-{steps}-steps")
            subjects[label] = model.with_name(f"samples-of-{model.name}")
            stages += [
                self._prepare(unique / "data", cell.seed, 1),
                self._train(unique / "data", model, cell, steps),
                self._sample(model, subjects[label], cell, {}),
            ]
        named = {f"samples.{subject}": path for subject, path in subjects.items()}
        other_data = {"other_data": list(oracles)} if oracles else {}
        to = {"out": self.evaluation(cell)}
        options = {"dataset": data, "index": index, **named, **other_data, **to}
        return [*stages, Stage("evaluate", options)]

    def _oracles(self, cell: Cell) -> dict[str, int]:
        """Trainings on the deduplicated data that a cell is compared with, and their steps."""
        if self.name != "oracle" or cell.factor == 1:
            return {}
        return {"oracle_steps": self.steps, "oracle_epochs": self.equal_epochs(cell.factor)}

    def equal_epochs(self, factor: int) -> int:
        """Steps in which the deduplicated set is seen as often as the other's records were."""
        unique = DIGITS_TRAIN
        return max(1, round(self.steps * unique / (unique + self.duplicated * (factor - 1))))

    def _prepare(self, data: Path, seed: int, factor: int) -> Stage:
        options: dict[str, Any] = {"out": data, "source": "digits", "seed": seed}
        if factor > 1:
            options |= {
                "plan.images": self.duplicated,
                "plan.factor": factor,
                "plan.choice": "balanced",
                "plan.seed": seed,
            }
        return Stage("prepare", options)

    def _train(self, data: Path, model: Path, cell: Cell, steps: int) -> Stage:
        return Stage(
            "train",
            {
                "data.path": data,
                "out": model,
                "model.class_conditional": cell.conditioning == "class",
                "trainer.max_steps": steps,
                "trainer.devices": 1,
                "trainer.sample_grid_every_n_steps": 0,
                "trainer.enable_progress_bar": False,
                "seed": cell.seed,
            },
        )

    def _sample(self, model: Path, out: Path, cell: Cell, guided: dict[str, Any]) -> Stage:
        conditional = cell.conditioning == "class"
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
            },
        )
