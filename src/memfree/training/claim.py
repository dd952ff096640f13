"""Decide whether a model folder may be written and which checkpoint training resumes from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from memfree.console import say
from memfree.folders.atomic import refuse_mount_point, remove_temporary
from memfree.folders.claim import Found, check_kind, first_difference, refuse_other
from memfree.folders.manifest import CONFIG_NAME, save_config
from memfree.models.export import DIFFUSERS_NAME
from memfree.models.options import LoggerName
from memfree.slurm.launcher import is_first_process
from memfree.training.checkpoints import (
    good_checkpoint,
    keep_only,
    latest_checkpoint,
    read_identity,
    step_of,
)
from memfree.training.loggers import build_logger

CHECKPOINTS = "checkpoints"
LOGS = "logs"
GRIDS = "samples"
LORA = "lora"
EXPOSURES = "exposures.parquet"
RECONSTRUCTIONS = "reconstructions.png"


@dataclass(frozen=True)
class Claim:
    """What a folder contains, as seen by the training that claims it."""

    found: Found  # open: to be trained; other: another model, which ``begin`` deletes
    checkpoint: Path | None = None  # verified, to resume from


def claim(
    out: Path,
    identity: dict[str, Any],
    batch_size: int,
    max_steps: int,
    max_epochs: int,
    overwrite: bool,
) -> Claim:
    """Accept ``out`` for a model of this identity, or raise; writes nothing, unlike ``begin``."""
    manifest = check_kind(out, "model")
    for name in (DIFFUSERS_NAME, LORA):  # replaced when the training is finished
        refuse_mount_point(out / name)
    if manifest:
        for name, kind in (("steps", int), ("epochs", int), ("identity", dict)):
            if not isinstance(manifest.get(name, kind()), kind):
                raise ValueError(f"{out}/manifest.json has no valid {name}: use another --out")
    trained = manifest.get("steps", 0)
    checkpoint = good_checkpoint(out / CHECKPOINTS)
    steps = max(trained, step_of(checkpoint) if checkpoint else 0)
    difference = None
    if manifest:
        wanted = {**identity, "batch_size": batch_size}
        held = {**manifest.get("identity", {}), "batch_size": manifest.get("batch_size")}
        difference = first_difference(held, wanted)
    if checkpoint and not difference:
        difference = first_difference(read_identity(checkpoint), identity)
    if not difference and 0 <= max_steps < steps:
        difference = f"it has {steps} steps there and --trainer.max_steps is {max_steps} here"
    refuse_other(out, difference, overwrite)
    if difference:
        return Claim("other")
    enough_epochs = 0 <= max_epochs <= manifest.get("epochs", 0)
    finished = bool(manifest) and (0 <= max_steps <= trained or enough_epochs)
    return Claim("finished") if finished else Claim("open", checkpoint)


def begin(out: Path, claimed: Claim) -> None:
    """Make room for a claimed training and save its configuration; only in the first process."""
    if not is_first_process():
        return
    if claimed.found == "other":
        clear(out)
    folders = ("", CHECKPOINTS, GRIDS, LOGS, f"{LOGS}/version_0")
    remove_temporary(*(out / name for name in folders))
    save_config(out)
    if claimed.checkpoint is not None:
        newest = latest_checkpoint(out / CHECKPOINTS)
        if newest != claimed.checkpoint:
            say(f"{newest} is damaged and not used", stderr=True)
        keep_only(claimed.checkpoint, out / CHECKPOINTS)
        say(f"resuming from {claimed.checkpoint}")


def clear(out: Path) -> None:
    """Delete what training writes, and nothing else in the folder."""
    for name in ("manifest.json", EXPOSURES, RECONSTRUCTIONS, CONFIG_NAME):
        (out / name).unlink(missing_ok=True)
    # Checkpoints last: if killed before, the same command still finds the other model.
    for name in (DIFFUSERS_NAME, LORA, LOGS, GRIDS, CHECKPOINTS):
        shutil.rmtree(out / name, ignore_errors=True)


class Beginning(Callback):
    """Clears the folder and opens its log; must be first, as others look for checkpoints there."""

    def __init__(self, out: Path, claimed: Claim, logger: LoggerName) -> None:
        self._out, self._claimed, self._logger = out, claimed, logger

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin on the first process while the others wait."""
        begin(self._out, self._claimed)
        trainer.strategy.barrier("the folder is ready")
        checkpoint = self._claimed.checkpoint
        step = 0 if checkpoint is None else step_of(checkpoint)
        trainer.logger = build_logger(self._logger, self._out, LOGS, step)
