"""Our training step, Lightning and all, over a bare torch loop of the same network.

``python benchmarks/training.py`` writes benchmarks/results/training.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler
from harness import Timing, compared, write
from lightning.pytorch.callbacks import Callback

from memfree.data import ExposureCounter, ShardDataModule, prepare
from memfree.data.plan import DuplicationPlan
from memfree.models import (
    DDPMModule,
    ExponentialMovingAverage,
    FiniteTraining,
    ModelOptions,
    build_network,
)
from memfree.models.loss_record import LossRecord
from memfree.models.options import NetworkOptions

BATCH, STEPS, WARMUP = 64, 60, 10
LIMIT = 1.05


class Clock(Callback):
    """Seconds of the steps after the warm-up, data loading included."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        if trainer.global_step == WARMUP:
            self.started = time.perf_counter()
        if trainer.global_step == WARMUP + STEPS:
            self.seconds = time.perf_counter() - self.started


def ours(data: Path, out: Path) -> float:
    """Seconds a step of what ``train.py`` runs between two checkpoints and sample grids.

    Data module, module, averaged weights, clipping, exposures, the check for finite losses and the
    record of the loss.
    """
    module_data = ShardDataModule(str(data), batch_size=BATCH)
    module = DDPMModule(ModelOptions(), (1, 8, 8))
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=WARMUP + STEPS,
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
    return clock.seconds / STEPS


def bare(images: torch.Tensor) -> float:
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
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            started = time.perf_counter()
        x_0 = images[torch.randint(len(images), (BATCH,), device=device)]
        t = torch.randint(1000, (BATCH,), device=device)
        noise = torch.randn_like(x_0)
        output = network(scheduler.add_noise(x_0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
    return (time.perf_counter() - started) / STEPS


def run(repetitions: int = 7) -> list[dict[str, Any]]:
    """Measure; one record (see ``harness.record``)."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(data, plan=DuplicationPlan(images=16, factor=64))
        module_data = ShardDataModule(str(data))
        assert module_data.folder is not None
        images = module_data.folder.part("train").images()
        timings: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(repetitions):
            timings["ours"].append(ours(data, Path(folder) / "out"))
            timings["bare"].append(bare(images))
    return [
        compared(
            f"training step, 8 x 8 U-Net, batch {BATCH} / bare torch loop",
            {name: Timing(seconds) for name, seconds in timings.items()},
            "ours",
            "bare",
            steps=STEPS,
            limit=LIMIT,
        )
    ]


if __name__ == "__main__":
    write("training", run())
