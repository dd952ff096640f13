"""Training batches of a dataset folder or of streamed shards, in one order on every machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import _shuffle

from memfree.console import counted
from memfree.data.dataset_folder import DatasetFolder, DatasetPart
from memfree.data.file_names import shard_labels
from memfree.data.ingest import Framing
from memfree.data.options import OnError, StreamOptions
from memfree.data.random_streams import Stream, buffer_random, generator_of
from memfree.data.record_reader import RecordReader
from memfree.data.shard_reader import expand_shards, read_shard
from memfree.data.skipped import LeftOut, Skipped
from memfree.data.tar_record import TarRecord
from memfree.images import from_bytes, further_frames, open_image


def permutation(records: int, seed: int, epoch: int) -> np.ndarray:
    """Order of all records in one epoch; ranks, workers and batch size play no part.

    Args:
        records: how many there are.
        seed: of the training run.
        epoch: from 0.

    Returns:
        (records,) int64.
    """
    return generator_of(seed, epoch, Stream.EPOCH).permutation(records)


def batches_per_epoch(records: int, batch_size: int, world_size: int) -> int:
    """Batches that every rank gets in an epoch.

    Batches are of nearly equal size and at most ``batch_size``; only with ``batch_size`` 1 on
    several ranks some may hold two, since no rank may be left without a record.

    Raises:
        ValueError: fewer records than ranks.
    """
    if batch_size < 1:
        raise ValueError(f"--data.batch_size {batch_size}: use 1 or more")
    if records < world_size:
        raise ValueError(
            f"{counted(records, 'training record')} cannot feed {world_size} ranks; "
            "use fewer devices"
        )
    return min(-(-records // (batch_size * world_size)), records // world_size)


def global_slice(records: int, batches: int, batch: int) -> tuple[int, int]:
    """Positions [start, end) in the epoch's order that global batch number ``batch`` takes."""
    return batch * records // batches, (batch + 1) * records // batches


def rank_slice(start: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions [start, end) of one rank within a global batch."""
    count = end - start
    return start + rank * count // world_size, start + (rank + 1) * count // world_size


Batch = dict[str, Any]
_log = logging.getLogger(__name__)


class RankBatches(IterableDataset[Batch]):
    """Batches of one rank, for one epoch after another.

    Set :attr:`epoch` and :attr:`start` before each iteration. They live in shared memory, so
    workers that stay between epochs see them.

    Args:
        records: of an epoch, all ranks together.
        batch_size: largest number of records of a batch on this rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        random_flip: mirror each record with probability 1/2.
        on_error: stop at what is broken, or leave it out; then each batch carries, as
            ``skipped``, a :class:`memfree.data.skipped.Skipped` of what was left out for it.
    """

    def __init__(
        self,
        records: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        random_flip: bool,
        on_error: OnError,
    ) -> None:
        self.records = records
        self.batches = batches_per_epoch(records, batch_size, world_size)
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._random_flip, self._on_error = random_flip, on_error
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Which order of the records, from 0."""
        return int(self._position[0])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._position[0] = value

    @property
    def start(self) -> int:
        """Batches of the epoch that were trained on already."""
        return int(self._position[1])

    @start.setter
    def start(self, value: int) -> None:
        self._position[1] = value

    def __len__(self) -> int:
        return self.batches


class EpochLoader:
    """A loader that asks which epoch it is, and where in it training stands.

    Args:
        epochs: the batches of this rank.
        num_workers: processes that decode; 0 decodes in this one.
        position: gives (epoch, batches of it that were trained on).
        count: takes each batch before it is handed out.
    """

    def __init__(
        self,
        epochs: RankBatches,
        num_workers: int,
        position: Callable[[], tuple[int, int]],
        count: Callable[[Batch], None],
    ) -> None:
        self.epochs = epochs
        self._position, self._count = position, count
        self._loader: DataLoader[Batch | Exception] = DataLoader(
            _WithErrors(epochs),
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.epochs.batches

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch.

        Lightning asks for an iterator long before it asks for its first batch, so the position is
        looked up with that one.
        """
        self.epochs.epoch, self.epochs.start = self._position()
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            self._count(batch)
            yield batch

    @property
    def _iterator(self) -> Any:
        """The workers, under the name by which Lightning finds and ends them after training."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is the trainer's. Tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _WithErrors(IterableDataset["Batch | Exception"]):
    """Batches, and the error that ends them: raised in a worker, it would be text of many lines."""

    def __init__(self, epochs: RankBatches) -> None:
        self._epochs = epochs

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            yield from self._epochs
        except (ValueError, OSError) as error:
            yield error


class EpochBatches(RankBatches):
    """Batches of one rank, whole and in order, for one epoch after another.

    Worker w of W makes every W-th batch, and a DataLoader hands them out in turn, so workers
    change nothing.

    Args:
        folder: the dataset.
        batch_size: largest number of records of a batch on this rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        cache_bytes: keep decoded images in memory if all take at most so much.
        random_flip: mirror each record with probability 1/2, by (seed, epoch, record).
        on_error: stop at a broken record, or leave it out.
    """

    def __init__(
        self,
        folder: DatasetFolder,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_bytes: int = 0,
        random_flip: bool = False,
        on_error: OnError = "stop",
    ) -> None:
        records = folder.part_records("train")
        super().__init__(len(records), batch_size, seed, rank, world_size, random_flip, on_error)
        self._reader = RecordReader(folder.path, records, folder.image_shape, cache_bytes)
        self._rows = torch.from_numpy(records["row"].to_numpy().copy())
        self._keys: list[str] = folder.items["image_key"].to_pylist()
        self._labels: torch.Tensor | None = None
        if folder.num_classes is not None:
            self._labels = torch.from_numpy(records["label"].to_numpy().copy())
        captions = records["caption"]
        self._captions = captions.combine_chunks() if captions.null_count == 0 else None

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, start = self.epoch, self.start
        order = permutation(self.records, self._seed, epoch)
        flips = None
        if self._random_flip:
            generator = generator_of(self._seed, epoch, Stream.FLIPS)
            flips = torch.from_numpy(generator.random(self.records) < 0.5)
        for batch in range(start + offset, self.batches, step):
            first, last = global_slice(self.records, self.batches, batch)
            mine = rank_slice(first, last, self._rank, self._world_size)
            yield self._batch(order, mine, last - first, flips)

    def _batch(
        self,
        order: np.ndarray,
        mine: tuple[int, int],
        total: int,
        flips: torch.Tensor | None,
    ) -> Batch:
        lost: list[int] = []
        skipped = Skipped()

        def broken(number: int, message: str) -> None:
            lost.append(number)
            skipped.record(message)

        numbers = order[mine[0] : mine[1]]
        skip = self._on_error == "skip"
        pixels = self._reader.read(numbers.tolist(), broken if skip else None)
        weight = len(numbers) * self._world_size / total
        if lost:
            numbers = numbers[~np.isin(numbers, lost)]
        skipped.kept = len(numbers)
        if len(numbers) == 0:  # other ranks wait for this one: fill in a record without weight
            numbers, pixels = self._readable(order, mine[1])
            weight = 0.0
        images = from_bytes(pixels)
        index = torch.from_numpy(numbers)
        if flips is not None:
            images = torch.where(flips[index][:, None, None, None], images.flip(-1), images)
        rows = self._rows[index]
        batch: Batch = {
            "image": images,
            "key": [self._keys[row] for row in rows.tolist()],
            "row": rows,
            "weight": weight,
        }
        if self._labels is not None:
            batch["label"] = self._labels[index]
        if self._captions is not None:
            batch["caption"] = self._captions.take(numbers).to_pylist()
        if skip:
            batch["skipped"] = skipped
        return batch

    def _readable(self, order: np.ndarray, position: int) -> tuple[np.ndarray, torch.Tensor]:
        """The first record from ``position`` on, around the end, that can be read."""
        for number in np.roll(order, -position):
            pixels = self._reader.read([int(number)], lambda number, message: None)
            if len(pixels):
                return np.array([number]), pixels
        raise ValueError("no training record can be read; prepare the dataset again")


class PartLoader:
    """Batches of the distinct images of one part, each once, in order; ranks take turns.

    Args:
        part: of a dataset folder.
        batch_size: images of a batch, at most.
        rank: of this process.
        world_size: number of processes.
        on_error: stop at an image that cannot be read, or leave it out; each is named once.

    Raises:
        ValueError: fewer images than processes.
    """

    def __init__(
        self, part: DatasetPart, batch_size: int, rank: int, world_size: int, on_error: OnError
    ) -> None:
        if len(part) < world_size:
            raise ValueError(
                f"{counted(len(part), f'{part.name} image')} cannot feed {world_size} ranks; use "
                "fewer devices, or no validation"
            )
        self._part, self._batch_size, self._on_error = part, batch_size, on_error
        self._numbers = range(rank, len(part), world_size)
        self._named: set[int] = set()

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """``image``, ``key``, ``row``; ``label`` and ``caption`` where the part has them."""
        part = self._part
        for start in range(0, len(self._numbers), self._batch_size):
            lost: list[int] = []

            def broken(number: int, message: str, lost: list[int] = lost) -> None:
                lost.append(number)
                if number not in self._named:
                    self._named.add(number)
                    _log.warning("skipped %s", message)

            numbers = self._numbers[start : start + self._batch_size]
            pixels = part.reader.read(numbers, broken if self._on_error == "skip" else None)
            index = torch.tensor([number for number in numbers if number not in lost])
            if not len(index):
                continue
            batch: Batch = {
                "image": from_bytes(pixels),
                "key": [part.keys[number] for number in index.tolist()],
                "row": part.rows[index],
            }
            if part.labels is not None:
                batch["label"] = part.labels[index]
            if part.captions is not None:
                batch["caption"] = [part.captions[number] for number in index.tolist()]
            yield batch


class ForeignBatches(RankBatches):
    """Batches of one rank, drawn from shards in an order of their own each epoch.

    The shards are shuffled by (seed, epoch) and dealt out to all workers of all ranks; where there
    are fewer shards than these, everyone reads all shards and takes every so-many-th record. A
    worker whose shards end before its share of the epoch begins them again in another order. All
    ranks get the same number of batches. Order depends on the number of ranks and workers, but not
    on time: with the same ranks and workers a resumed epoch continues with the batches that were
    left. Those before are read again, and decoded too where broken records are left out.

    Args:
        shards: see :func:`memfree.data.shard_reader.expand_shards`.
        options: epoch length, framing, conditions.
        batch_size: largest number of records of a batch on this rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        random_flip: mirror each record with probability 1/2.
        on_error: stop at a broken or missing record or shard, or leave it out.

    Attributes:
        missing: takes local shards that are not there.
        left_out: what lies beside the shards; each batch carries, as ``left_out``, what was met in
            them and not used.
    """

    def __init__(
        self,
        shards: str,
        options: StreamOptions,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        random_flip: bool = False,
        on_error: OnError = "stop",
    ) -> None:
        if options.epoch_records < 1:
            raise ValueError(
                f"--data.path {shards} has no manifest, so its size is unknown: give "
                "--data.stream.epoch_records, or make a dataset folder with memfree prepare"
            )
        size = options.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        if min(height, width) < 1:
            raise ValueError("--data.stream.image_size: give the height and width of the images")
        super().__init__(
            options.epoch_records, batch_size, seed, rank, world_size, random_flip, on_error
        )
        self.missing = Skipped()
        self.left_out = LeftOut()
        self._shards = expand_shards(
            shards, self.missing if on_error == "skip" else None, self.left_out
        )
        self._labels = shard_labels(self._shards)
        self._options = options
        self._records_as = options.records
        if not options.captions:  # then it does not matter what is wrong with them
            self._records_as = replace(options.records, caption_source="none")
        self._framing = Framing(height, width, options.channels, options.resize)
        self.image_shape = (int(options.channels), height, width)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, start = self.epoch, self.start
        offset = (start + number) % step  # the loader asks worker 0 first, also after a resume
        skipped = Skipped()
        unit = self._rank * step + offset
        left_out = LeftOut()
        records = self._records(epoch, unit, self._world_size * step, skipped, left_out)
        generator = generator_of(self._seed, epoch, unit, Stream.STREAMED_FLIPS)
        for batch in range(offset, self.batches, step):
            first, last = global_slice(self.records, self.batches, batch)
            low, high = rank_slice(first, last, self._rank, self._world_size)
            flips = generator.random(high - low) < 0.5
            if batch < start:  # trained on before the run was stopped
                self._pass_over(records, high - low, skipped, left_out)
                continue
            made = self._batch(records, high - low, flips, skipped, left_out)
            made["weight"] = (high - low) * self._world_size / (last - first)
            if self._on_error == "skip":
                made["skipped"] = skipped.take()
            made["left_out"] = left_out.take()
            yield made

    def _records(
        self, epoch: int, unit: int, units: int, skipped: Skipped, left_out: LeftOut
    ) -> Iterator[TarRecord]:
        """Records of one worker without end, shuffled within its buffer."""
        shared = len(self._shards) < units
        # Where everyone reads all shards, one of them counts what is broken.
        counter = Skipped() if shared and unit else skipped
        handler = counter if self._on_error == "skip" else None

        def one_pass(turn: int) -> Iterator[TarRecord]:
            generator = generator_of(self._seed, epoch, turn, Stream.SHARDS)
            order = generator.permutation(len(self._shards))
            mine = order if shared else order[unit::units]
            found = 0
            for shard in mine.tolist():
                read = read_shard(
                    self._shards[shard],
                    handler,
                    left_out,
                    self._records_as,
                    "--data.stream.records.",
                    self._labels[shard],
                )
                for number, record in enumerate(read):
                    found += 1
                    if not shared or (number + turn) % units == unit:
                        yield record
            if not found:
                first = f"; first {counter.messages[0]}" if counter.messages else ""
                other = f"; {left_out.text()}" if left_out else ""
                shards = counted(len(mine), "shard")
                raise ValueError(f"no readable record in {shards}{first}{other}")

        buffer = max(self._options.shuffle_buffer, 1)
        for turn in count():
            rng = buffer_random(self._seed, epoch, turn, unit)
            yield from _shuffle(one_pass(turn), buffer, buffer, rng)

    def _pass_over(
        self, records: Iterator[TarRecord], size: int, skipped: Skipped, left_out: LeftOut
    ) -> None:
        """Leave out the records of a batch; broken ones, which others replaced in it, as well."""
        for _ in range(size):
            if self._on_error == "stop":  # then there were none, and nothing need be decoded
                next(records)
            else:
                self._next_whole(records, skipped, left_out)
        skipped.take()

    def _next_whole(
        self, records: Iterator[TarRecord], skipped: Skipped, left_out: LeftOut
    ) -> tuple[TarRecord, np.ndarray]:
        """The next record that decodes, and its pixels (C, H, W)."""
        while True:
            record = next(records)
            try:
                return record, self._decode(record, left_out)
            except ValueError as error:
                if self._on_error == "stop":
                    raise
                skipped.record(str(error))

    def _batch(
        self,
        records: Iterator[TarRecord],
        size: int,
        flips: np.ndarray,
        skipped: Skipped,
        left_out: LeftOut,
    ) -> Batch:
        images: list[np.ndarray] = []
        taken: list[TarRecord] = []
        while len(taken) < size:
            record, pixels = self._next_whole(records, skipped, left_out)
            flip = self._random_flip and flips[len(taken)]
            images.append(pixels[:, :, ::-1] if flip else pixels)
            taken.append(record)
        skipped.kept += size
        batch: Batch = {
            "image": from_bytes(torch.from_numpy(np.stack(images))),
            "key": [record.image_key or record.name for record in taken],
            "row": torch.full((size,), -1),
        }
        if self._options.num_classes:
            batch["label"] = torch.tensor([record.label for record in taken])
        if self._options.captions:
            batch["caption"] = [record.caption for record in taken]
        return batch

    def _decode(self, record: TarRecord, left_out: LeftOut) -> np.ndarray:
        classes = self._options.num_classes
        if classes and (record.label is None or record.label >= classes):
            raise ValueError(f"{record.name}: class {record.label} is not in 0..{classes - 1}")
        if self._options.captions and record.caption is None:
            raise ValueError(f"{record.name}: record without a caption")
        image = open_image(record.image, record.name)
        if frames := further_frames(image):
            note = left_out.at(record.name)
            note(f"{record.name}: {counted(frames, 'further frame')}")
        return self._framing.apply(image, record.name, self._framing)
