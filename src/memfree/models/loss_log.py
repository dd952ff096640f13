"""The recorded loss as a CSV file that goes on, row for row, where a run is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from memfree.folders.atomic_files import write_atomic

METRICS = "metrics.csv"
SAVED_EVERY = 100
"""Optimizer steps after which rows that are not yet on the disk are written."""


class LossLog(Logger):
    """Writes ``folder/version_0/metrics.csv``, one row a record, atomically.

    Lightning's own logger begins another file with every start, and forgets the rows that it had
    not written when it was killed. Here all rows are on the disk before a checkpoint is, and a run
    that goes on from a checkpoint keeps the rows up to it.

    Args:
        folder: of the logs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._rows: list[dict[str, Any]] = []
        self._saved = 0
        self._last_step = 0

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self._folder.name

    @property
    def version(self) -> int:
        """Always 0: there is one log a model."""
        return 0

    @property
    def log_dir(self) -> str:
        """Folder of the file."""
        return str(self._folder / f"version_{self.version}")

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / METRICS

    @rank_zero_only
    def keep_before(self, step: int) -> None:
        """Take up the rows of an earlier run, those before optimizer step ``step``."""
        self._rows, self._saved = [], 0
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
            self._rows = [row for row in rows if int(row["step"]) < step]
            self._saved = len(self._rows) if len(self._rows) == len(rows) else -1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        assert step is not None
        self._rows.append({**metrics, "step": step})
        if step - self._last_step >= SAVED_EVERY:
            self._last_step = step
            self.save()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is saved beside the model."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file if there are rows that are not in it."""
        if self._saved == len(self._rows):
            return
        names = sorted({name for row in self._rows for name in row})

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self._rows)

        write_atomic(self.path, write)
        self._saved = len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()
