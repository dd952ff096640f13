"""Short trainings on the distinct images of a dataset: the loop, its options, its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from memfree.console import quiet
from memfree.data.dataset_folder import DatasetFolder, RecordReader
from memfree.data.random_streams import Stream, generator_of
from memfree.data.split import PartName
from memfree.folders.atomic import put_in_place, unfinished
from memfree.folders.manifest import save_config
from memfree.images import from_bytes
from memfree.models.module import adamw, warm_up
from memfree.models.options import Accelerator
from memfree.training.callbacks import FiniteTraining, StepProgress
from memfree.training.loggers import LossRecord
from memfree.training.trainer import build_trainer


class DistinctImages(Dataset[dict[str, Any]]):
    """Every distinct image of some parts once, however often the training set repeats it.

    Decoded images are kept in memory if all of them take at most ``cache_bytes``. ValueError where
    all of the parts are empty.
    """

    def __init__(
        self, folder: DatasetFolder, parts: Sequence[PartName], cache_bytes: int = 1 << 30
    ) -> None:
        records = pa.concat_tables([folder.part_records(part) for part in parts])
        if len(records) == 0:
            raise ValueError(f"{folder.path} has no images in {', '.join(parts)}; prepare it again")
        records = records.take(originals(records))
        self._reader = RecordReader(folder.path, records, folder.image_shape, cache_bytes)
        captions = records["caption"]
        self.captions: list[str] | None = captions.to_pylist() if captions.null_count == 0 else None
        """Those of the original records, not one that a duplication plan gave to a copy."""
        names = folder.items["group"].take(records["row"]).to_pylist()
        self.groups = torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, numbers: list[int]) -> dict[str, Any]:
        """A batch: ``image`` (B, C, H, W) in [-1, 1], ``group`` and ``row`` (B,), ``caption``."""
        batch: dict[str, Any] = {
            "image": from_bytes(self._reader.read(numbers)),
            "group": self.groups[numbers],
            "row": torch.tensor(numbers),
        }
        if self.captions is not None:
            batch["caption"] = [self.captions[number] for number in numbers]
        return batch

    def images(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [-1, 1]."""
        return from_bytes(self._reader.read(range(len(self))))

    def loader(self, batch_size: int, steps: int, seed: int) -> DataLoader[Any]:
        """``steps`` batches; each pass through the images is another permutation by ``seed``."""
        if batch_size > len(self):
            raise ValueError(
                f"--batch_size {batch_size}: there are only {len(self)} images; use fewer"
            )
        sampler = _Permutations(len(self), batch_size, steps, seed)
        return DataLoader(self, batch_size=None, sampler=sampler)


def originals(records: pa.Table) -> np.ndarray:
    """Positions of one record a row: that of its lowest copy number, in the order of rows."""
    row, copy = (records[name].to_numpy() for name in ("row", "copy"))
    order = np.lexsort((copy, row))
    return order[np.unique(row[order], return_index=True)[1]]


class _Permutations(Sampler[list[int]]):
    """Batches of numbers; the rest of a permutation is dropped, so that no batch repeats one."""

    def __init__(self, count: int, batch_size: int, steps: int, seed: int) -> None:
        self._count, self._batch_size, self._steps, self._seed = count, batch_size, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches(), self._steps)

    def _batches(self) -> Iterator[list[int]]:
        generator = generator_of(self._seed, Stream.DISTINCT_IMAGES)
        while True:
            order = generator.permutation(self._count)
            for start in range(0, self._count - self._batch_size + 1, self._batch_size):
                yield order[start : start + self._batch_size].tolist()


def fit(
    module: pl.LightningModule, loader: DataLoader[Any], steps: int, accelerator: Accelerator
) -> float:
    """Train for ``steps`` batches; the loss at the end, a mean over the last 50 steps."""
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
    return adamw(groups, rate, warm_up(warm, total))
