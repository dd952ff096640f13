"""Plan of a text-to-image study: all mitigations on one small model of captioned emoji."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from memfree.cli.stages import Stage
from memfree.data.options import PromptSet
from memfree.guidance.options import sampling_options
from memfree.study.plan import Plan, Subjects, check_stage

CONFIG = Path("configs/emoji_scratch.yaml")
"""How the model is trained."""
AT_MOST = "at_most"
"""Option of a subject that sampling does not have: the largest number of its samples."""
ORACLE = "oracle"
"""The same network trained on the images without repetitions."""
REFERENCE = "none"
"""Unguided samples, which the others are compared with where a study has them."""


@dataclass(frozen=True)
class Counts:
    """Samples of each subject, by what they are prompted with."""

    duplicated: PositiveInt = 500
    """Captions of the repeated training images, in turn."""
    other: PositiveInt = 200
    """Captions of the other training images."""
    unseen: PositiveInt = 250
    """Captions of the test images."""


@dataclass(frozen=True)
class Training:
    """The emoji model that is studied, and how it is made to memorize."""

    repeated: PositiveInt = 10
    """Training images that are repeated, of 500."""
    factor: PositiveInt = 100
    """Copies of a repeated image in the training set."""
    plan_seed: NonNegativeInt = 1
    """Seed for the choice of repeated images."""
    seed: NonNegativeInt = 1
    """Seed for weights, order and noise."""
    steps: PositiveInt = 3000
    """Optimizer steps."""


@dataclass(frozen=True)
class TextPlan(Plan):
    """One model, a cell for each prompt set; see :func:`memfree.commands.study.text_study`."""

    training: Training = Training()
    counts: Counts = Counts()
    prompt_sets: list[PromptSet] = field(default_factory=lambda: ["duplicated", "other", "unseen"])
    oracle: bool = True
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 50
    noise_seed: int = 2000

    def check(self) -> None:
        """Refuse also wrong options of subjects."""
        super().check()
        if self.oracle and ORACLE in self.subjects:
            raise ValueError(
                f"--subjects: {ORACLE} is the model without repetitions; choose another name"
            )
        if not self.prompt_sets:
            raise ValueError("--prompt_sets is empty: name at least one, such as duplicated")
        for subject, options in self.subjects.items():
            most = options.get(AT_MOST, 1)
            if not isinstance(most, int) or isinstance(most, bool) or most < 1:
                raise ValueError(
                    f"--subjects.{subject}.{AT_MOST} must be a whole number above 0, not {most!r}"
                )
        for stage in self.sampled(self.prompt_sets[0]):
            check_stage(stage, "--subjects")

    def check_inputs(self) -> None:
        """Refuse another working directory than the repository's."""
        if not CONFIG.is_file():
            raise FileNotFoundError(
                f"there is no {CONFIG} here: run memfree study in the root of its repository"
            )

    def cells(self) -> list[PromptSet]:
        """The prompt sets: all are drawn from one model."""
        return list(dict.fromkeys(self.prompt_sets))

    def stages(self, cell: PromptSet) -> list[Stage]:
        """Everything up to the model, then samples and evaluations of one prompt set."""
        return [*self.shared(), *self.trained(), *self.sampled(cell), *self.judged(cell)]

    def record(self, cell: PromptSet) -> Path:
        """``plan-SEED/study-NAME-PROMPTS.json``."""
        return self.folder / f"study-{self.name}-{cell}.json"

    def evaluations(self, cell: PromptSet) -> list[Path]:
        """One for each judge."""
        return [self.evaluation / cell / judge for judge in ("pixels", "embedding")]

    @property
    def folder(self) -> Path:
        """Folder of this plan's model and of all that is drawn from it."""
        return self.out / f"plan-{self.training.plan_seed}"

    @property
    def unique(self) -> Path:
        """Folder of the data without repetitions and of the oracle."""
        return self.out / "unique"

    @property
    def evaluation(self) -> Path:
        """Folder of this study's metrics; several studies may share a model."""
        return self.folder / f"evaluation-{self.name}"

    def everyone(self) -> Subjects:
        """The subjects, and the oracle, which is not guided."""
        return {**self.subjects, **({ORACLE: {}} if self.oracle else {})}

    def samples(self, prompts: PromptSet, subject: str) -> Path:
        """Folder of one subject's samples; studies with other noise do not share it."""
        return self.folder / f"samples-{self.noise_seed}" / prompts / subject

    def shared(self) -> list[Stage]:
        """What does not depend on which images are repeated: it is made of the data without."""
        data, embeddings = self.unique / "data", ("embedding", "second_embedding")
        return [
            self._prepare(data, {}),
            Stage("scratch", {"dataset": data, "out": self.out / "base"}),
            *(
                Stage("train-embedding", {"dataset": data, "out": self.out / each, "seed": seed})
                for seed, each in enumerate(embeddings, 1)
            ),
            Stage("train-clip", {"dataset": data, "out": self.out / "clip"}),
        ]

    def trained(self) -> list[Stage]:
        """Data with repetitions, its indexes, the model; the oracle."""
        plan = {
            "plan.images": self.training.repeated,
            "plan.factor": self.training.factor,
            "plan.seed": self.training.plan_seed,
        }
        data = self.folder / "data"
        stages = [self._prepare(data, plan)]
        for index, features, path in (
            ("index", "copy_detection", self.out / "embedding"),
            ("latents", "latents", self.out / "base" / "diffusers"),
        ):
            options = {"dataset": data, "out": self.folder / index, "features": features}
            stages.append(Stage("index", {**options, "extractor.path": path}))
        stages.append(self._train(data, self.folder / "model"))
        if self.oracle:
            stages.append(self._train(self.unique / "data", self.unique / "model"))
        return stages

    def sampled(self, prompts: PromptSet) -> list[Stage]:
        """Samples of everyone with one of the prompt sets, from the same noise."""
        count = getattr(self.counts, prompts)
        return [
            Stage(
                "sample",
                {
                    "model": (self.unique if subject == ORACLE else self.folder) / "model",
                    "index": self.folder / "index",
                    "latents": self.folder / "latents",
                    "prompts.dataset": self.folder / "data",
                    "prompts.captions": prompts,
                    "prompts.least_records": self.training.factor,
                    "out": self.samples(prompts, subject),
                    "count": min(count, options.get(AT_MOST, count)),
                    "batch_size": self.batch_size,
                    "scheduler": "ddim",
                    "steps": self.steps,
                    "guidance_scale": self.guidance_scale,
                    "seed": self.noise_seed,
                    "trainer.devices": 1,
                    "allow_other_dataset": subject == ORACLE,
                    **sampling_options({key: options[key] for key in options if key != AT_MOST}),
                },
            )
            for subject, options in self.everyone().items()
        ]

    def judged(self, prompts: PromptSet) -> list[Stage]:
        """Everything measured of them, judged by pixels and by the second embedding."""
        pixels, embedding = self.evaluations(prompts)
        named = {f"samples.{each}": self.samples(prompts, each) for each in self.everyone()}
        given = {
            "dataset": self.folder / "data",
            "index": self.folder / "index",
            **named,
            "reference": reference_of(self.subjects),
            **({"other_data": [ORACLE]} if self.oracle else {}),
        }
        second = {"second_embedding": self.out / "second_embedding"}
        return [
            Stage("evaluate", {**given, "clip": self.out / "clip", "out": pixels}),
            Stage("evaluate", {**given, **second, "out": embedding}),
        ]

    def _prepare(self, data: Path, plan: dict[str, Any]) -> Stage:
        return Stage("prepare", {"source": "emoji", "image_size": 32, "out": data, **plan})

    def _train(self, data: Path, model: Path) -> Stage:
        return Stage(
            "train",
            {
                "config": CONFIG,
                "data.path": data,
                "model.pretrained": self.out / "base",
                "out": model,
                "trainer.max_steps": self.training.steps,
                "trainer.sample_grid_every_n_steps": 0,
                "trainer.devices": 1,
                "seed": self.training.seed,
            },
        )


def reference_of(subjects: Iterable[str]) -> str:
    """Whom the others are compared with: the unguided samples, without them the first subject."""
    named = list(subjects)
    return REFERENCE if REFERENCE in named else named[0]
