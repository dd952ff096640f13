"""``memfree train``: train a diffusion model on a dataset folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from memfree.cli.errors import named_option
from memfree.console import counted, quiet, say
from memfree.data.options import DataOptions
from memfree.folders.atomic import put_in_place, unfinished
from memfree.models import FineTuneOptions, ModelOptions
from memfree.models.options import Devices, LoggerName

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    import lightning.pytorch as pl

    from memfree.data import ShardDataModule
    from memfree.models import DiffusionModule

_log = logging.getLogger(__name__)
ADVICE = (
    # Reading is a small part of a step; small sets need no workers.
    ".*does not have many workers.*",
    "Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
)


@dataclass(frozen=True)
class TrainerOptions:
    """Training length, hardware and logging; names are those of Lightning's Trainer arguments."""

    max_steps: int = 1500
    """Total optimizer steps; -1: as many as max_epochs needs."""
    max_epochs: int = -1
    """Total epochs; -1: as many as max_steps needs."""
    accelerator: str = "auto"
    """Kind of device: auto, cpu, gpu, mps, ..."""
    devices: int | str = "auto"
    """Number of devices of a node, a list such as 0,1, or auto."""
    num_nodes: PositiveInt = 1
    """Number of machines."""
    strategy: str = "auto"
    """How several devices work together: auto, ddp, ..."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic of the network; auto: bf16-mixed on GPUs that have it, else 32-true."""
    accumulate_grad_batches: PositiveInt = 1
    """Batches summed for one optimizer step, at most an epoch's; its last step takes the rest."""
    gradient_clip_val: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    log_every_n_steps: PositiveInt = 50
    """Optimizer steps between two records of the loss."""
    logger: LoggerName = "csv"
    """Format of the losses in out/logs: csv, tensorboard, none or wandb (Weights & Biases; for work
    without a network set WANDB_MODE=offline)."""
    checkpoint_every_n_steps: PositiveInt = 500
    """Optimizer steps between two checkpoints; only the newest is kept."""
    sample_grid_every_n_steps: NonNegativeInt = 500
    """Optimizer steps between two sample grids from fixed noise; 0: none."""
    val_check_interval: NonNegativeInt = 0
    """Batches between measurements of val/loss on the data's test part; 0: none."""
    copy_rate_index: Path | None = None
    """Calibrated reference index; with val_check_interval, the share of a few samples that it calls
    copies is recorded as val/copy_rate."""
    copy_rate_samples: PositiveInt = 64
    """Number of such samples, always from the same noise."""
    enable_progress_bar: bool = True
    """Whether a progress bar with the loss is shown."""


def train(
    data: DataOptions,
    out: Path,
    model: ModelOptions,
    trainer: TrainerOptions,
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
) -> None:
    """Train a diffusion model and save it as a diffusers folder.

    The same command again resumes from the newest checkpoint, or does nothing if it is finished;
    another model's folder is refused. SIGTERM saves a checkpoint and ends the training after the
    optimizer step (on several GPUs: after every fifth); a SLURM job warned of its end is requeued.

    Args:
        data: The dataset folder and how its records are read.
        out: Model folder to write: checkpoints, logs, sample grids, and at the end diffusers/
            (averaged weights), lora/ (adapters, if trained) and manifest.json.
        model: The model and how its weights are found.
        trainer: Training length, hardware and logging.
        seed: Seed of the weights and of all noise in training.
        overwrite: Delete a model of another dataset or configuration in out.
    """
    from memfree.data import ShardDataModule
    from memfree.models import export_model
    from memfree.models.text_to_image import TextToImageModule
    from memfree.out_of_memory import explained_memory
    from memfree.training.callbacks import FiniteTraining, NotFiniteError
    from memfree.training.checkpoints import AtomicCheckpointIO
    from memfree.training.claim import EXPOSURES, LORA, Beginning, claim
    from memfree.training.loggers import LossRecord, check_logger, finish
    from memfree.training.trainer import build_trainer

    records = ShardDataModule(**vars(data))
    for name in ("max_steps", "max_epochs"):
        value = getattr(trainer, name)
        if value < -1 or value == 0:
            raise ValueError(f"--trainer.{name} {value}: give 1 or more, or -1 for no such limit")
    if trainer.max_steps == trainer.max_epochs == -1:
        raise ValueError("give --trainer.max_steps or --trainer.max_epochs: both are -1")
    if trainer.val_check_interval:
        with named_option("--trainer.val_check_interval"):
            records.val_dataloader()
    copy_rate = _copy_rate(trainer, seed)
    # Without devices: a run may resume on another number of them.
    accumulated, precision = trainer.accumulate_grad_batches, _precision(trainer)
    stepping = {
        "precision": precision,
        "accumulate_grad_batches": accumulated,
        "gradient_clip_val": trainer.gradient_clip_val,
    }
    module = _module(model, records, seed, stepping)
    limits = trainer.max_steps, trainer.max_epochs
    claimed = claim(out, module.identity(), records.batch_size, *limits, overwrite)
    if claimed.found == "finished":
        say(f"{out} is already trained as asked")
        return
    losses = LossRecord(trainer.log_every_n_steps)
    check_logger(trainer.logger)
    with quiet(*ADVICE):
        fit = build_trainer(
            **{option.name: getattr(trainer, option.name) for option in fields(Devices)},
            precision=precision,
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
            accumulate_grad_batches=accumulated,
            gradient_clip_val=trainer.gradient_clip_val or None,
            log_every_n_steps=trainer.log_every_n_steps,
            limit_val_batches=1.0 if trainer.val_check_interval else 0,
            val_check_interval=trainer.val_check_interval or None,
            check_val_every_n_epoch=None if trainer.val_check_interval else 1,
            num_sanity_val_steps=0,
            callbacks=[
                Beginning(out, claimed, trainer.logger),
                FiniteTraining(trainer.log_every_n_steps),
                losses,
                *copy_rate,
                *_callbacks(out, model, trainer, seed),
            ],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=out,
        )
        batches = records.batches(fit.world_size)
        if accumulated > batches:
            raise ValueError(
                f"--trainer.accumulate_grad_batches {accumulated}: an epoch has only "
                f"{counted(batches, 'batch', 'batches')}, and a step ends with it; give {batches} "
                "or fewer, or a smaller --data.batch_size"
            )
        if (rest := batches % accumulated) and fit.is_global_zero:
            line = "the last step of an epoch adds up %d of its %d batches, not %d"
            _log.warning(line, rest, batches, accumulated)
        try:
            with explained_memory("training", _less_memory(records, model, trainer)):
                fit.fit(module, datamodule=records, ckpt_path=claimed.checkpoint, weights_only=True)
        except NotFiniteError:
            # All ranks fail alike: one line for the user.
            if fit.is_global_zero:
                raise
            raise SystemExit(2) from None
    finish(fit.logger)
    skipped = records.skipped_on_all_ranks().counts()
    left_out = records.left_out_on_all_ranks()
    if fit.is_global_zero:
        averaged = module.average or module
        # Lightning counts the epoch in which max_steps falls as whole.
        batches_of_last = fit.fit_loop.epoch_loop.batch_progress.current.ready
        if isinstance(averaged, TextToImageModule) and model.finetune.lora_rank:
            with unfinished(out / LORA) as partial:
                averaged.save_adapters(partial)
                put_in_place(partial, out / LORA, overwrite=True)
        export_model(
            out,
            averaged.pipeline(),
            seed,
            image_shape=list(module.image_shape),
            **module.facts(),
            dataset=records.path,
            dataset_hash=records.dataset_hash,
            batch_size=records.batch_size,
            devices=fit.world_size,
            **stepping,
            steps=fit.global_step,
            epochs=losses.epoch + int(batches_of_last >= fit.num_training_batches),
            identity=module.identity(),
            exposures=_exposure_summary(out / EXPOSURES),
            skipped=skipped,
            **({"left_out": left_out.counts()} if left_out else {}),
        )
        loss = losses.last()
        trained = f"{out}: trained {counted(fit.global_step, 'step')}"
        say(trained if loss is None else f"{trained}, loss {loss:.3g}")
    fit.strategy.barrier()


def _module(
    model: ModelOptions, data: ShardDataModule, seed: int, stepping: dict[str, Any]
) -> DiffusionModule:
    from memfree.models import DDPMModule
    from memfree.models.text_pipeline import load_pipeline
    from memfree.models.text_to_image import TextToImageModule

    read = data.identity()
    if model.pretrained is None:
        default = FineTuneOptions()
        for option in fields(default):
            if getattr(model.finetune, option.name) != getattr(default, option.name):
                raise ValueError(f"--model.finetune.{option.name} needs --model.pretrained")
        return DDPMModule(model, data.image_shape, data.num_classes, seed, read, stepping)
    if model.class_conditional:
        raise ValueError("--model.class_conditional is for pixel models, not --model.pretrained")
    if data.folder is not None and not data.folder.manifest.get("captions"):
        raise ValueError(
            f"--data.path {data.path} has no captions, which --model.pretrained is trained with: "
            "prepare captioned images"
        )
    with named_option("--model.pretrained"):
        pipe = load_pipeline(model.pretrained)
    return TextToImageModule(model, pipe, data.image_shape, seed, read, stepping)


def _less_memory(data: ShardDataModule, model: ModelOptions, options: TrainerOptions) -> list[str]:
    smaller = (
        f"a smaller --data.batch_size (now {data.batch_size}) with a larger "
        f"--trainer.accumulate_grad_batches (now {options.accumulate_grad_batches})"
    )
    tuning = model.finetune if model.pretrained is not None else None
    checkpointing = "--model.finetune.gradient_checkpointing true"
    ways = {
        smaller: data.batch_size > 1,
        checkpointing: tuning is not None and not tuning.gradient_checkpointing,
        "--trainer.precision bf16-mixed": _precision(options) == "32-true",
        "--model.finetune.cache false": model.finetune.cache,
        "--model.ema_decay 0": model.ema_decay > 0,
        "--model.finetune.lora_rank 16": tuning is not None and not tuning.lora_rank,
    }
    return [way for way, helps in ways.items() if helps]


def _precision(options: TrainerOptions) -> Any:
    import torch

    if options.precision != "auto":
        return options.precision
    on_gpu = options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _callbacks(
    out: Path, model: ModelOptions, options: TrainerOptions, seed: int
) -> list[pl.Callback]:
    from memfree.training import ExponentialMovingAverage, ExposureCounter, SampleGrid
    from memfree.training.callbacks import StepProgress
    from memfree.training.checkpoints import Checkpoints, Preemption
    from memfree.training.claim import CHECKPOINTS, GRIDS

    callbacks: list[pl.Callback] = [
        ExposureCounter(str(out)),
        Checkpoints(out / CHECKPOINTS, options.checkpoint_every_n_steps),
    ]
    if model.ema_decay:
        callbacks.append(ExponentialMovingAverage(model.ema_decay))
    if options.sample_grid_every_n_steps:
        callbacks.append(SampleGrid(out / GRIDS, options.sample_grid_every_n_steps, seed=seed))
    if options.enable_progress_bar:
        callbacks.append(StepProgress())
    # Last, so that it saves the state of the others.
    return [*callbacks, Preemption()]


def _copy_rate(options: TrainerOptions, seed: int) -> list[pl.Callback]:
    if options.copy_rate_index is None:
        return []
    from memfree.retrieval import ReferenceIndex
    from memfree.sampling import CopyRate

    with named_option("--trainer.copy_rate_index"):
        if not options.val_check_interval:
            raise ValueError("pass --trainer.val_check_interval, too: how often to measure")
        index = ReferenceIndex.load(options.copy_rate_index)
        return [CopyRate(index, int(options.copy_rate_samples), seed=seed)]


def _exposure_summary(path: Path) -> dict[str, Any]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    exposures = pq.read_table(path, columns=["exposures"])["exposures"]
    return {
        "total": pc.sum(exposures).as_py(),
        "images_seen": pc.sum(pc.greater(exposures, 0)).as_py(),
        "largest": pc.max(exposures).as_py(),
    }
