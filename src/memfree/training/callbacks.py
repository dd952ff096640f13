"""Training callbacks: averaged weights, finite losses, sample grids, exposures, progress."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid, save_image

from memfree.console import ProgressLine, plain_console
from memfree.data.datamodule import ShardDataModule
from memfree.folders.atomic import write_atomic
from memfree.models.module import DiffusionModule


class ExponentialMovingAverage(WeightAveraging):
    """Keeps ``average ← decay · average + (1 − decay) · weights`` at each step; decay in [0, 1).

    Like Lightning's, checkpoints hold the average as ``state_dict`` and validation uses it. Unlike
    there, the first step counts and the module keeps its weights; its ``pipeline()`` is averaged.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self.decay = decay
        self._update = get_ema_multi_avg_fn(decay)
        # Collected once: walking through the modules costs a millisecond.
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights to the training device."""
        self._pairs = None
        self._device = trainer.strategy.root_device
        if stage == "fit" and isinstance(pl_module, DiffusionModule):
            pl_module.set_average(None)  # an earlier training's would be copied too
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its average for its pipeline."""
        if isinstance(pl_module, DiffusionModule):
            average = self.average
            assert isinstance(average, DiffusionModule)
            pl_module.set_average(average)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average after each optimizer step."""
        if trainer.global_step > self._latest_update_step:
            if self._pairs is None:
                self._pairs = list(self.average.parameters()), list(pl_module.parameters())
            with torch.no_grad():
                self._update(*self._pairs, 0)
            self._latest_update_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module unchanged: the last checkpoint must hold both."""

    @property
    def average(self) -> nn.Module:
        """The averaged copy of the Lightning module."""
        assert self._average_model is not None
        return self._average_model.module


class NotFiniteError(ValueError):
    """A loss or weight became NaN or infinite; raised on all ranks."""


class FiniteTraining(Callback):
    """Raises NotFiniteError on all ranks once a loss is NaN or infinite, and before checkpoints.

    Reading a loss waits for the device, and agreeing for the ranks, so both happen every
    ``every_n_steps``; only a single CPU process checks each step.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Record whether this step's loss is finite; raise when due."""
        self._check(outputs["loss"])
        cheap = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if cheap or trainer.global_step % self.every_n_steps == 0:
            self._raise_if_bad(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Refuse to save weights that are not finite."""
        for parameter in pl_module.parameters():
            self._check(parameter)
        self._raise_if_bad(trainer)

    def _check(self, values: Tensor) -> None:
        bad = ~torch.isfinite(values.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def _raise_if_bad(self, trainer: Trainer) -> None:
        ok = self._bad is None or not bool(self._bad)
        if not trainer.strategy.reduce_boolean_decision(ok, all=True):
            path = getattr(trainer.checkpoint_callback, "best_model_path", "")
            kept = f"{Path(path)} is the last good checkpoint"
            raise NotFiniteError(
                f"the loss or the weights became NaN or infinite by step {trainer.global_step}; "
                f"{kept if path else 'no checkpoint was saved yet'}; "
                "lower --model.learning_rate, or check the images"
            )


@dataclass(eq=False)
class SampleGrid(Callback):
    """Writes ``samples-STEP.png`` every N optimizer steps and at the last, with averaged weights.

    ``count`` images by ``steps`` DDIM steps, from the same noise each time; also to TensorBoard.
    """

    folder: Path
    every_n_steps: int
    count: int = 36
    steps: int = 25
    seed: int = 0
    _last_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Draw a grid when due; at the last step too, in case training is killed before its end."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw this step's grid once."""
        # global_step repeats while gradients accumulate over several batches.
        if not trainer.is_global_zero or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, DiffusionModule)
        averaged = pl_module.average or pl_module
        images = averaged.preview(self.count, self.steps, self.seed).float()
        # Not to_bytes: loggers and save_image take [0, 1], and save_image rounds halves up.
        grid = make_grid(images / 2 + 0.5, nrow=round(self.count**0.5))
        write_atomic(
            self.folder / f"samples-{trainer.global_step:07d}.png",
            lambda path: save_image(grid, path, format="png"),
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)


class ExposureCounter(Callback):
    """Counts how often each distinct image was in a training batch, over all ranks and restarts.

    Writes ``folder/exposures.parquet`` (default: the trainer's root folder) with ``image_key,
    group, copies, exposures``, one row per dataset item; for foreign shards only images seen, with
    null groups and copies. Schema metadata has the counts of broken records as JSON (``skipped``).
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._rows: Tensor | None = None
        self._keys: Counter[str] = Counter()
        self._trainer: Trainer | None = None
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, or resume from a checkpoint, whose counts stay with rank 0."""
        self._trainer = trainer
        dataset = _data(trainer).folder
        rows = len(dataset.items) if dataset is not None else 0
        self._rows = torch.zeros(rows, dtype=torch.int64)
        self._keys = Counter()
        if self._loaded is not None and trainer.is_global_zero:
            self._rows += self._loaded["rows"]
            self._keys.update(self._loaded["keys"])
        self._loaded = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; write the table at the last step, before a checkpoint can end the run."""
        assert self._rows is not None
        if batch["weight"] != 0:
            if len(self._rows):
                # Counted on the batch's device: a copy to the host would wait for the whole step.
                rows = batch["row"]
                self._rows = self._rows.to(rows.device)
                self._rows.index_add_(0, rows, torch.ones_like(rows))
            else:
                self._keys.update(batch["key"])
        if trainer.global_step == trainer.max_steps:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table unless already written."""
        if trainer.global_step != trainer.max_steps:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        state = self.state_dict()
        skipped = _data(trainer).skipped_on_all_ranks()
        if not trainer.is_global_zero:
            return
        dataset = _data(trainer).folder
        if dataset is not None:
            table = dataset.items.select(["image_key", "group", "copies"])
            table = table.append_column("exposures", pa.array(state["rows"].numpy()))
        else:
            keys = sorted(state["keys"])
            group, copies = (pa.nulls(len(keys), kind) for kind in (pa.string(), pa.int64()))
            table = pa.table({"image_key": keys, "group": group, "copies": copies})
            table = table.append_column("exposures", pa.array([state["keys"][k] for k in keys]))
        table = table.replace_schema_metadata({"skipped": json.dumps(skipped.counts())})
        folder = Path(self.folder or trainer.default_root_dir)
        write_atomic(folder / "exposures.parquet", lambda path: pq.write_table(table, path))

    def state_dict(self) -> dict[str, Any]:
        """Counts of all ranks; Lightning saves checkpoints on all ranks at once."""
        if self._rows is None or self._trainer is None:
            return {"rows": torch.zeros(0, dtype=torch.int64), "keys": {}}
        rows, keys = self._rows.to("cpu", copy=True), Counter(self._keys)
        if distributed.is_available() and distributed.is_initialized():
            on_device = rows.to(self._trainer.strategy.root_device)
            distributed.all_reduce(on_device)
            rows = on_device.cpu()
            if not len(rows):
                gathered: list[Any] = [None] * distributed.get_world_size()
                distributed.all_gather_object(gathered, dict(keys))
                keys = sum((Counter(part) for part in gathered), Counter())
        return {"rows": rows, "keys": dict(keys)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the counts of the resumed run."""
        self._loaded = state_dict


def _data(trainer: Trainer) -> ShardDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ShardDataModule):
        raise ValueError("ExposureCounter counts batches of a ShardDataModule only")
    return data


class StepProgress(Callback):
    """One bar over all optimizer steps, on stderr by default; Lightning's restarts each epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or plain_console(stderr=True)
        self._line: ProgressLine | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar from the first or resumed step."""
        if trainer.is_global_zero:
            steps = float(trainer.estimated_stepping_batches)
            total = int(steps) if math.isfinite(steps) else None
            done = trainer.global_step
            self._line = ProgressLine(self._console, "training", "step {} of {}", total, done)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move the bar every ten steps and at the last one."""
        step = trainer.global_step
        if self._line is not None and (step % 10 == 0 or step == self._line.total):
            loss = trainer.callback_metrics.get("loss")
            self._line.show(step, "" if loss is None else f"loss {float(loss):.4f}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Close the bar, so that further output starts on a new line."""
        if self._line is not None:
            self._line.close()

    on_train_end = on_exception
