"""``memfree text-study``: compare all mitigations on one text-to-image model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from memfree.cli.stages import Stage, run_stages
from memfree.console import plain_console
from memfree.data.options import PromptSet
from memfree.folders.manifest import save_config, write_manifest
from memfree.guidance.options import sampling_options

Subjects = dict[str, dict[str, Any]]
"""Mitigations and their options by subject, as {"wen_5": {"mitigation": "wen", "target": 5}}."""
AT_MOST = "at_most"
"""Option of a subject that is none of sampling: draw no more than so many samples of it."""
_NAME = re.compile(r"[\w-]+")


def check_study(name: str, subjects: Subjects, prompt_sets: Sequence[str], oracle: bool) -> None:
    """Refuse what cannot be studied; what sample.py takes, ``Stage.check`` asks sample.py.

    Raises:
        ValueError: names the option.
    """
    from memfree.offline.text_study_results import ORACLE

    for option, names in (("name", [name]), ("subjects", [*subjects])):
        for one in names:
            if not _NAME.fullmatch(one):
                raise ValueError(f"--{option}: use letters, digits, - and _ for the name {one!r}")
    if not subjects:
        raise ValueError("--subjects is empty: name at least one way to sample")
    if oracle and ORACLE in subjects:
        raise ValueError(f"--subjects: {ORACLE} is the model without repetitions; choose a name")
    if not prompt_sets:
        raise ValueError("--prompt_sets is empty: name at least one, such as duplicated")
    for subject, options in subjects.items():
        most = options.get(AT_MOST, 1)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(
                f"--subjects.{subject}.{AT_MOST} must be a whole number above 0, not {most!r}"
            )


CONFIG = Path("configs/emoji_scratch.yaml")
"""How the model is trained."""


@dataclass(frozen=True)
class Counts:
    """Samples of each subject, by what they are prompted with."""

    duplicated: PositiveInt = 500
    """Captions of the repeated training images, in turn."""
    other: PositiveInt = 200
    """Captions of the other training images."""
    unseen: PositiveInt = 250
    """Captions of the test images."""

    def of(self, prompts: PromptSet) -> int:
        """Samples with one of the prompt sets."""
        return int(getattr(self, prompts))


@dataclass(frozen=True)
class Training:
    """The emoji model that is studied, and how it is made to memorize."""

    repeated: PositiveInt = 10
    """Training images that are repeated, of 500."""
    factor: PositiveInt = 100
    """Records of a repeated image."""
    plan_seed: NonNegativeInt = 1
    """Of the choice of repeated images."""
    seed: NonNegativeInt = 1
    """Of weights, order and noise."""
    steps: PositiveInt = 3000
    """Optimizer steps."""


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
    dry_run: bool = False,
) -> None:
    """Train a small text-to-image model with repeated images, sample it in many ways, and compare.

    Captioned emoji, a Stable Diffusion built from nothing, an embedding that guides and another
    that judges, a CLIP: all are trained here, without a download. Every subject draws its samples
    from the same noise. Copies are judged by the measure that guides, by pixels, and by the second
    embedding. Folders have fixed names and what is finished is not done again, so that a study
    goes on where it stopped, and processes may take different prompt sets: run it with all of
    them at the end, for tables of all.

    Args:
        name: of the study; its results are NAME.csv, .parquet, .md, .png, -rows.png, and, if a
            subject is called none, -detection.png.
        subjects: ways to sample, by name: a mitigation and its options; and at_most, for
            subjects that are too slow, or matter too little, for all samples of a prompt set.
        out: folder for everything; studies of the same data share it.
        training: the model.
        counts: samples by prompt set.
        prompt_sets: which of them.
        oracle: also the same network trained on the images without repetitions.
        steps: denoising steps (DDIM).
        guidance_scale: of classifier-free guidance.
        batch_size: samples drawn together.
        noise_seed: of the samples; keep those of studies that choose settings apart.
        dry_run: print the commands and stop.

    Raises:
        ValueError: there is no subject or no prompt set, a name cannot be used, or an option of a
            subject is none of sampling's; before anything runs.
        FileNotFoundError: it was not started in the repository's folder.
    """
    from memfree.offline.text_study_results import summarise_text, write_rows

    check_study(name, subjects, prompt_sets, oracle)
    study = TextStudy(
        name, subjects, out, training, counts, oracle, steps, guidance_scale, batch_size, noise_seed
    )
    for stage in study.sampled(prompt_sets[0]):
        stage.check()
    stages = [*study.shared(), *study.trained()]
    for prompts in prompt_sets:
        stages += [*study.sampled(prompts), *study.evaluated(prompts)]
    console = plain_console()
    if dry_run:
        lines = "\n".join(stage.line() for stage in stages)
        console.print(lines, markup=False, emoji=False, highlight=False, soft_wrap=True)
        return
    if not CONFIG.is_file():
        raise FileNotFoundError(
            f"there is no {CONFIG} here: run memfree text-study in the root of its repository"
        )
    run_stages(stages, console)
    drawn = {subject: study.samples(prompt_sets[0], subject) for subject in study.everyone()}
    write_rows(study.cell / f"{name}-rows.png", drawn)
    summarise_text(study.cell, name, study.drawn, prompt_sets, list(study.everyone()), console)
    save_config(study.evaluation)
    write_manifest(study.evaluation, "study", noise_seed, name=name, subjects=subjects)


@dataclass(frozen=True)
class TextStudy:
    """The commands of a study, in order; see :func:`text_study`."""

    name: str
    subjects: Subjects
    out: Path
    training: Training
    counts: Counts
    oracle: bool
    steps: int
    guidance_scale: float
    batch_size: int
    noise_seed: int

    @property
    def cell(self) -> Path:
        """Folder of this plan's model and of all that is drawn from it."""
        return self.out / f"plan-{self.training.plan_seed}"

    @property
    def unique(self) -> Path:
        """Folder of the data without repetitions and of the oracle."""
        return self.out / "unique"

    @property
    def evaluation(self) -> Path:
        """Folder of this study's figures; several studies may share a model."""
        return self.cell / f"evaluation-{self.name}"

    def everyone(self) -> Subjects:
        """The subjects, and the oracle, which is not guided."""
        from memfree.offline.text_study_results import ORACLE

        return {**self.subjects, **({ORACLE: {}} if self.oracle else {})}

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
        extractors = {
            "index": ("copy_detection", self.out / "embedding"),
            "latents": ("latents", self.out / "base" / "diffusers"),
        }
        data = self.cell / "data"
        stages = [self._prepare(data, plan)]
        stages += [
            Stage(
                "index",
                {
                    "dataset": data,
                    "out": self.cell / folder,
                    "features": features,
                    "extractor.path": path,
                },
            )
            for folder, (features, path) in extractors.items()
        ]
        stages.append(self._train(data, self.cell / "model"))
        if self.oracle:
            stages.append(self._train(self.unique / "data", self.unique / "model"))
        return stages

    def sampled(self, prompts: PromptSet) -> list[Stage]:
        """Samples of everyone with one of the prompt sets."""
        from memfree.offline.text_study_results import ORACLE

        return [
            Stage(
                "sample",
                {
                    "model": (self.unique if subject == ORACLE else self.cell) / "model",
                    "index": self.cell / "index",
                    "latents": self.cell / "latents",
                    "prompts.dataset": self.cell / "data",
                    "prompts.captions": prompts,
                    "prompts.least_records": self.training.factor,
                    "out": self.samples(prompts, subject),
                    "count": min(self.counts.of(prompts), options.get(AT_MOST, 1 << 30)),
                    "batch_size": self.batch_size,
                    "scheduler": "ddim",
                    "steps": self.steps,
                    "guidance_scale": self.guidance_scale,
                    "seed": self.noise_seed,
                    "trainer.devices": 1,
                    "allow_other_dataset": subject == ORACLE,
                    **sampling_options(
                        {key: value for key, value in options.items() if key != AT_MOST}
                    ),
                },
            )
            for subject, options in self.everyone().items()
        ]

    def evaluated(self, prompts: PromptSet) -> list[Stage]:
        """Everything measured of them, judged by pixels and by the second embedding."""
        from memfree.offline.text_study_results import ORACLE, reference_of

        named = {f"samples.{one}": self.samples(prompts, one) for one in self.everyone()}
        given = {
            "dataset": self.cell / "data",
            "index": self.cell / "index",
            **named,
            "reference": reference_of(self.subjects),
            **({"other_data": [ORACLE]} if self.oracle else {}),
        }
        to = self.evaluation / prompts
        second = {"second_embedding": self.out / "second_embedding"}
        return [
            Stage("evaluate", {**given, "clip": self.out / "clip", "out": to / "pixels"}),
            Stage("evaluate", {**given, **second, "out": to / "embedding"}),
        ]

    @property
    def drawn(self) -> Path:
        """Folder of all samples; studies of other noise do not share it."""
        return self.cell / f"samples-{self.noise_seed}"

    def samples(self, prompts: PromptSet, subject: str) -> Path:
        """Folder of one subject's samples."""
        return self.drawn / prompts / subject

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
