"""ShardDataModule: training data for Lightning, resumable at any step."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from memfree.console import counted
from memfree.data.batches import (
    Batch,
    EpochBatches,
    EpochLoader,
    ForeignBatches,
    PartLoader,
    RankOptions,
    batches_per_epoch,
)
from memfree.data.dataset_folder import DatasetFolder
from memfree.data.file_names import is_tar
from memfree.data.options import DataOptions, OnError, RecordOptions, StreamOptions
from memfree.data.skipped import LeftOut, Skipped
from memfree.folders.claim import first_difference


def epoch_order(
    batches: int, global_batch_size: int, ranks: int, workers: int | None
) -> dict[str, Any]:
    """What an epoch's batches depend on besides records and seed; ``workers`` None: irrelevant."""
    readers = None if workers is None else {"ranks": ranks, "workers": max(workers, 1)}
    return {"batches": batches, "global_batch_size": global_batch_size, "readers": readers}


def check_resumable(progress: dict[str, int], stopped: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume within an epoch whose batches would now differ (see ``epoch_order``).

    At an epoch's end, sets Lightning's batch counts ``progress`` to the new number of batches:
    otherwise it would resume at the old one.
    """

    def readers(order: dict[str, Any]) -> str:
        readers = order["readers"] or {"ranks": 1, "workers": 1}
        ranks, workers = counted(readers["ranks"], "rank"), counted(readers["workers"], "worker")
        return f"{ranks} with {workers} each"

    def batches(order: dict[str, Any]) -> str:
        batches = counted(order["batches"], "batch", "batches")
        return f"{batches} of at most {counted(order['global_batch_size'], 'record')}"

    trained = progress["ready"]
    if trained >= stopped["batches"]:
        for name in progress:
            progress[name] += now["batches"] - trained
        return
    if stopped["readers"] != now["readers"]:
        raise ValueError(
            f"the checkpoint stopped within an epoch that {readers(stopped)} read, now "
            f"{readers(now)} would: shards without a manifest resume with the same "
            "--trainer.devices and --data.num_workers only"
        )
    if stopped["batches"] != now["batches"]:
        raise ValueError(
            f"the checkpoint stopped within an epoch of {batches(stopped)}, now it would have "
            f"{batches(now)}; give the --data.batch_size and --trainer.devices of before, or "
            "others that make as many batches"
        )


_NO_STREAM = StreamOptions()
_NAMED = 3  # things skipped that are named; the others are counted
_log = logging.getLogger(__name__)
Report = TypeVar("Report", Skipped, LeftOut)


class ShardDataModule(LightningDataModule):
    """Batches of a dataset folder's training part, or of third-party WebDataset shards.

    A batch is a dictionary: ``image`` (B, C, H, W) float32 in [-1, 1]; ``key``, a list of image
    keys; ``row`` (B,) int64, rows of the dataset's items (-1 for foreign shards); ``label`` (B,)
    int64 if there are labels; ``caption``, a list, if there are captions; ``weight``, a factor of
    the batch's mean loss that makes the mean over ranks that over all records (0: all are broken).

    An epoch of a dataset folder is one permutation by (seed, epoch), whatever the ranks and
    workers. Validation reads each distinct test image once, without ``weight``.

    Args:
        path: dataset folder, or shards without a manifest: a folder of tars, a glob, or addresses
            with braces.
        batch_size: largest number of records in a batch on each rank.
        num_workers: processes that decode; 0 decodes in the training process.
        cache_bytes: keep decoded images in memory if all take at most this (without workers only).
        random_flip: mirror each record with probability 1/2.
        on_error: stop at a broken record or shard, or skip, name and count it.
        verify: compare the SHA-256 of every shard at the start, not only its size.
        stream: how to read shards without a manifest.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        cache_bytes: int = 1 << 30,
        random_flip: bool = False,
        on_error: OnError = "stop",
        verify: bool = False,
        stream: StreamOptions = _NO_STREAM,
    ) -> None:
        super().__init__()
        DataOptions(str(path), batch_size, num_workers=num_workers)  # refuses impossible numbers
        self.path, self.batch_size, self.seed = str(path), batch_size, seed
        self.num_workers, self.cache_bytes = num_workers, cache_bytes
        self.random_flip, self.on_error, self.verify = random_flip, on_error, verify
        self.stream = stream
        self.skipped = Skipped()
        self.left_out = LeftOut()
        self._folder: DatasetFolder | None = None
        self._loader: EpochLoader | None = None

    @property
    def folder(self) -> DatasetFolder | None:
        """Opened dataset folder; None for foreign shards."""
        if self._folder is None and not self._is_foreign():
            self._folder = DatasetFolder(Path(self.path), self.verify, self.on_error)
        return self._folder

    def _is_foreign(self) -> bool:
        path = Path(self.path)
        if path.is_dir():
            tars = any(is_tar(file.name) for file in path.iterdir())
            return not (path / "manifest.json").is_file() and tars
        return path.is_file() or any(sign in self.path for sign in ":{*?[")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of all images."""
        if self.folder is not None:
            return self.folder.image_shape
        stream = self.dataset()
        assert isinstance(stream, ForeignBatches)
        return stream.image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of labels, None without labels."""
        if self.folder is not None:
            return self.folder.num_classes
        return self.stream.num_classes or None

    @property
    def dataset_hash(self) -> str | None:
        """Hash of the dataset folder; None for foreign shards."""
        return self.folder.hash if self.folder is not None else None

    def identity(self) -> dict[str, Any]:
        """Records and their order as JSON; shards without a hash by address and options."""
        read: dict[str, Any] = {
            "hash": self.dataset_hash,
            "seed": self.seed,
            "random_flip": self.random_flip,
        }
        if self.folder is None:
            stream = json.loads(json.dumps(asdict(self.stream)))
            if self.stream.records == RecordOptions():
                del stream["records"]  # absent in checkpoints of earlier versions
            read |= {"path": self.path, "stream": stream}
        return read

    def dataset(self, rank: int = 0, world_size: int = 1) -> EpochBatches | ForeignBatches:
        """The batches of one rank."""
        options = RankOptions(
            self.batch_size, self.seed, rank, world_size, self.random_flip, self.on_error
        )
        if self.folder is None:
            return ForeignBatches(self.path, self.stream, options)
        return EpochBatches(self.folder, options, self.cache_bytes if self.num_workers == 0 else 0)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> EpochLoader:
        """Batches of this rank, one epoch per iteration."""
        rank, world_size = self._place()
        dataset = self.dataset(rank, world_size)
        if isinstance(dataset, ForeignBatches):
            self.skipped.shards |= dataset.missing.shards
            self.left_out.add(dataset.left_out)
            if dataset.missing and rank == 0:
                count = counted(len(dataset.missing.shards), "shard")
                _log.warning("skipped %s; first: %s", count, dataset.missing.messages[0])
        self._loader = EpochLoader(dataset, self.num_workers, self._position, self.count)
        return self._loader

    def val_dataloader(self) -> PartLoader | list[PartLoader]:
        """Test batches of this rank; in training an empty list if there are none."""
        folder = self.folder
        if folder is None or not len(folder.part_records("test")):
            if self.trainer is None or self.trainer.state.fn == TrainerFn.VALIDATING:
                raise ValueError(
                    f"{self.path} has no test part to validate on: give a dataset folder prepared "
                    "with --parts.test"
                )
            return []
        return PartLoader(folder.part("test"), self.batch_size, *self._place(), self.on_error)

    def count(self, batch: Batch) -> None:
        """Count and log what was left out of a batch."""
        self.left_out.add(batch.pop("left_out", LeftOut()))
        named = len(self.skipped.messages)
        self.skipped.add(batch.pop("skipped", Skipped()))
        for message in self.skipped.messages[named:_NAMED]:
            _log.warning("skipped %s", message)
        if named < _NAMED <= len(self.skipped.messages):
            _log.warning("what else is broken is counted, not named")

    def skipped_on_all_ranks(self) -> Skipped:
        """Sum of ``skipped`` over all ranks; a collective call."""
        return self.skipped if self.on_error == "stop" else self._gathered(self.skipped)

    def left_out_on_all_ranks(self) -> LeftOut:
        """Sum of ``left_out`` over all ranks; a collective call."""
        return self._gathered(self.left_out) if self.folder is None else self.left_out

    @staticmethod
    def _gathered(report: Report) -> Report:
        if not (distributed.is_available() and distributed.is_initialized()):
            return report
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, report)
        total = type(report)()
        for part in gathered:
            total.add(part)
        return total

    def teardown(self, stage: str) -> None:
        """End the workers and report what training left out."""
        if stage != "fit":
            return
        if self._loader is not None:
            self._loader.close()
        total, other = self.skipped_on_all_ranks(), self.left_out_on_all_ranks()
        if self.trainer is None or self.trainer.is_global_zero:
            for text in filter(None, (total.text(), other.text())):
                _log.warning("%s", text)

    def batches(self, world_size: int) -> int:
        """Number of batches in an epoch on each rank."""
        folder = self.folder
        records = len(folder.part_records("train")) if folder else self.stream.epoch_records
        return batches_per_epoch(records, self.batch_size, world_size)

    def _order(self) -> dict[str, Any]:
        _, world_size = self._place()
        workers = self.num_workers if self.folder is None else None
        batches = self.batches(world_size)
        return epoch_order(batches, self.batch_size * world_size, world_size, workers)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share; Lightning keeps the position."""
        return {
            "identity": self.identity(),
            "order": self._order(),
            "skipped": self.skipped_on_all_ranks().counts(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a stopped run; ValueError if its records or next batches would differ."""
        if difference := first_difference(state_dict.get("identity"), self.identity(), "data"):
            raise ValueError(
                f"the checkpoint was trained on other records than {self.path} gives now: "
                f"{difference}; give the same options, or start a new run"
            )
        if "order" not in state_dict:
            raise ValueError("the checkpoint is of an earlier version of memfree: start a new run")
        trainer = self.trainer
        if trainer is None or trainer.is_global_zero:  # the counts are of all ranks
            self.skipped = Skipped.from_counts(state_dict["skipped"])
        if trainer is not None:
            # Lightning restores its loops from the same checkpoint after this.
            loops = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]
            progress = loops["epoch_loop.batch_progress"]["current"]
            check_resumable(progress, state_dict["order"], self._order())

    def _position(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 0
        return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
