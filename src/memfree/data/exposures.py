"""How often each image was trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from memfree.data.datamodule import ShardDataModule
from memfree.folders.atomic_files import write_atomic


class ExposureCounter(Callback):
    """Counts how often each distinct image was in a training batch, over all ranks and restarts.

    At the end of training ``exposures.parquet`` is written: ``image_key, group, copies,
    exposures``, one row an item of the dataset. For foreign shards, groups and copies are null and
    only images that were seen appear. What was left out as broken is counted in the file's schema
    metadata, as JSON under ``skipped``.

    Args:
        folder: where to; default: the trainer's root folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._rows: Tensor | None = None
        self._keys: Counter[str] = Counter()
        self._trainer: Trainer | None = None
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from a checkpoint; the counts before it stay with rank 0."""
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
        """Count one batch, and write the table if it is the last.

        At the end of training it would come after the last checkpoint: a run that is killed
        between the two has nothing left to train, and so no end of training.
        """
        assert self._rows is not None
        if batch["weight"] != 0:
            if len(self._rows):
                # Counted where the batch is: a copy to the host would wait for the whole step.
                rows = batch["row"]
                self._rows = self._rows.to(rows.device)
                self._rows.index_add_(0, rows, torch.ones_like(rows))
            else:
                self._keys.update(batch["key"])
        if trainer.global_step == trainer.max_steps:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, unless that is done."""
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
            table = pa.table(
                {
                    "image_key": keys,
                    "group": pa.nulls(len(keys), pa.string()),
                    "copies": pa.nulls(len(keys), pa.int64()),
                    "exposures": [state["keys"][key] for key in keys],
                }
            )
        table = table.replace_schema_metadata({"skipped": json.dumps(skipped.counts())})
        folder = Path(self.folder or trainer.default_root_dir)
        write_atomic(folder / "exposures.parquet", lambda path: pq.write_table(table, path))

    def state_dict(self) -> dict[str, Any]:
        """Counts of all ranks together; Lightning saves checkpoints on all ranks at once."""
        if self._rows is None or self._trainer is None:
            return {"rows": torch.zeros(0, dtype=torch.int64), "keys": {}}
        rows, keys = self._rows.to("cpu", copy=True), Counter(self._keys)
        if distributed.is_available() and distributed.is_initialized():
            device = self._trainer.strategy.root_device
            on_device = rows.to(device)
            distributed.all_reduce(on_device)
            rows = on_device.cpu()
            if not len(rows):
                gathered: list[Any] = [None] * distributed.get_world_size()
                distributed.all_gather_object(gathered, dict(keys))
                keys = sum((Counter(part) for part in gathered), Counter())
        return {"rows": rows, "keys": dict(keys)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts of the run that goes on."""
        self._loaded = state_dict


def _data(trainer: Trainer) -> ShardDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ShardDataModule):
        raise ValueError("ExposureCounter counts batches of a ShardDataModule only")
    return data
