"""Lightning checkpoints of a model folder: the newest is kept, found and checked for resuming."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from memfree.models.module import CHECKPOINT_KEY


class Checkpoints(ModelCheckpoint):
    """Saves ``folder/step-N.ckpt`` every so many optimizer steps and at the end; keeps the newest.

    Needs no state of its own on resuming, so a folder may be moved between two runs.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        """Save below ``folder`` every ``every_n_steps`` steps."""
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the checkpoint that is there, which the next one replaces."""
        super().setup(trainer, pl_module, stage)
        # Below dirpath, which is resolved like the names that Lightning compares it with.
        newest = latest_checkpoint(Path(str(self.dirpath)))
        self.best_model_path = str(newest) if newest else ""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        """Save if it is time, or if this was the last step.

        The last step is saved here, before Lightning counts an epoch that it ends early as whole.
        """
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step == trainer.max_steps:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step if it is not saved yet."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        # Lightning would keep the one that this run was resumed from for ever.
        return previous != current

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder itself says which checkpoint is the newest."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, None where there is none."""
    found = sorted(folder.glob(f"step-{8 * '[0-9]'}.ckpt"))
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """Optimizer steps taken before this checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def read_identity(path: Path) -> dict[str, Any]:
    """Which model a checkpoint is of, read without executing anything in it.

    Raises:
        ValueError: it is damaged, or not a checkpoint of memfree.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch packs nothing; others may pack bombs
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("packed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript file, which is refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        identity = checkpoint[CHECKPOINT_KEY]
    except Exception as error:  # whatever a pickle of someone else makes torch raise
        raise ValueError(
            f"{path} is damaged or not a checkpoint of memfree ({type(error).__name__}): "
            "delete it, or use another --out"
        ) from error
    if not isinstance(identity, dict):
        raise ValueError(f"{path} does not say which model it is of: use another --out")
    return identity
