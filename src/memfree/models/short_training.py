"""Trains a small auxiliary network in one go: minutes, one device, no checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from memfree.difference import first_difference
from memfree.folders.manifest import check_kind, read_manifest
from memfree.folders.resolved import save_config
from memfree.folders.whole_folder import check_place, put_in_place, unfinished
from memfree.models.finite import FiniteTraining
from memfree.models.loss_record import LossRecord
from memfree.models.options import Accelerator
from memfree.models.progress import StepProgress
from memfree.quiet import quiet
from memfree.trainers import build_trainer


def is_finished(out: Path, kind: str, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``out`` holds just what would be trained.

    Args:
        out: the folder; need not exist.
        kind: of its manifest.
        identity: what the network is trained with, JSON values.
        overwrite: whether another of this kind may be replaced.

    Raises:
        ValueError: it holds something else, or another network and not ``overwrite``, or what is
            trained could not be put there.
        OSError: nothing can be written beside it.
    """
    check_kind(out, kind)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        check_place(out)
        return False
    found = read_manifest(out, kind)  # refuses files of something else
    difference = first_difference(found.get("identity"), identity)
    if difference and not overwrite:
        raise ValueError(
            f"--out {out} holds another one: {difference}; use another --out, or --overwrite true"
        )
    if difference:
        check_place(out)
    return not difference


def fit(
    module: pl.LightningModule, loader: DataLoader[Any], steps: int, accelerator: Accelerator
) -> float:
    """Train for ``steps`` batches; the loss at the end, a mean over the last 50 steps.

    Raises:
        ValueError: there is no such device, or the loss is no longer finite.
    """
    losses = LossRecord(min(50, steps))
    with quiet(
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*module.s. in eval mode.*",
    ):
        trainer = build_trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[FiniteTraining(), losses, StepProgress()],
            log_every_n_steps=min(50, steps),
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader)
    return losses.last() or float("nan")


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, manifest last, and put it in place when it is complete."""
    with unfinished(out) as partial:
        save_config(partial)
        write(partial)
        put_in_place(partial, out, overwrite=True)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The generator of all that one training step draws."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> 1))


def adamw_with_cosine(module: pl.LightningModule, rate: float, decay: float) -> Any:
    """AdamW whose rate rises over a twentieth of all steps and falls to 0 along a cosine.

    Weight decay is for matrices and kernels only.
    """
    total = float(module.trainer.estimated_stepping_batches)
    warm = max(1, round(0.05 * total))
    trained = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in trained if value.ndim > 1], "weight_decay": decay},
        {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
