"""Our training step, Lightning and all, over a bare torch loop of the same network.

``python benchmarks/training.py`` writes benchmarks/results/training.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler
from harness import Records, Timing, compared, measure
from lightning.pytorch.callbacks import Callback

from memfree.commands.prepare import prepare
from memfree.data import ShardDataModule
from memfree.data.duplication_plan import DuplicationPlan
from memfree.models import DDPMModule, ModelOptions, build_network
from memfree.models.options import NetworkOptions
from memfree.training import ExponentialMovingAverage, ExposureCounter, FiniteTraining
from memfree.training.loggers import LossRecord


class Size(NamedTuple):
    """How much is measured."""

    batch: int
    steps: int
    """Timed optimizer steps."""
    warmup: int
    """Steps before them."""
    repetitions: int


FULL, TINY = Size(64, 60, 10, 7), Size(4, 3, 1, 2)
LIMIT = 1.05


class Clock(Callback):
    """Seconds of the steps after the warm-up, data loading included."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.started = 0.0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        if trainer.global_step == self.size.warmup:
            self.started = time.perf_counter()
        if trainer.global_step == self.size.warmup + self.size.steps:
            self.seconds = time.perf_counter() - self.started


def ours(data: Path, out: Path, size: Size) -> float:
    """Seconds a step of what ``train.py`` runs between two checkpoints and sample grids.

    Data module, module, averaged weights, clipping, exposures, the check for finite losses and the
    record of the loss.
    """
    module_data = ShardDataModule(str(data), batch_size=size.batch)
    module = DDPMModule(ModelOptions(), (1, 8, 8))
    clock = Clock(size)
    trainer = pl.Trainer(
        max_steps=size.warmup + size.steps,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=50,
        callbacks=[
            FiniteTraining(50),
            LossRecord(50),
            ExposureCounter(str(out)),
            ExponentialMovingAverage(0.995),
            clock,
        ],
    )
    trainer.fit(module, datamodule=module_data)
    return clock.seconds / size.steps


def bare(images: torch.Tensor, size: Size) -> float:
    """Seconds a step of a loop that a diffusers user writes: the images lie in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build_network(NetworkOptions(), (1, 8, 8)).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    scheduler: Any = DDPMScheduler()
    images = images.to(device)
    started = 0.0
    for step in range(size.warmup + size.steps):
        if step == size.warmup:
            started = time.perf_counter()
        x_0 = images[torch.randint(len(images), (size.batch,), device=device)]
        t = torch.randint(1000, (size.batch,), device=device)
        noise = torch.randn_like(x_0)
        output = network(scheduler.add_noise(x_0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
    return (time.perf_counter() - started) / size.steps


def run(tiny: bool = False) -> Records:
    """Measure; one record (see ``harness.record``)."""
    size = TINY if tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(data, plan=DuplicationPlan(images=16, factor=64))
        module_data = ShardDataModule(str(data))
        assert module_data.folder is not None
        images = module_data.folder.part("train").images()
        timings: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(size.repetitions):
            timings["ours"].append(ours(data, Path(folder) / "out", size))
            timings["bare"].append(bare(images, size))
    return [
        compared(
            f"training step, 8 x 8 U-Net, batch {size.batch} / bare torch loop",
            {name: Timing(seconds) for name, seconds in timings.items()},
            "ours",
            "bare",
            steps=size.steps,
            limit=LIMIT,
        )
    ]


if __name__ == "__main__":
    measure("training", run)
