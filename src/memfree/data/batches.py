"""Training batches of a dataset folder or of streamed shards, in one order on every machine."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from webdataset.filters import shuffle

from memfree.console import counted
from memfree.data.dataset_folder import DatasetFolder, DatasetPart, RecordReader
from memfree.data.file_names import shard_labels
from memfree.data.ingest import Framing
from memfree.data.options import OnError, StreamOptions
from memfree.data.random_streams import Stream, buffer_random, generator_of
from memfree.data.shard_reader import expand_shards, read_shard
from memfree.data.skipped import LeftOut, Skipped
from memfree.data.tar_record import TarRecord
from memfree.images import from_bytes, further_frames, open_image

Batch = dict[str, Any]
_log = logging.getLogger(__name__)


def permutation(records: int, seed: int, epoch: int) -> np.ndarray:
    """(records,) int64: an epoch's order, whatever the ranks, workers and batch size."""
    return generator_of(seed, epoch, Stream.EPOCH).permutation(records)


def batches_per_epoch(records: int, batch_size: int, world_size: int) -> int:
    """Batches per rank, nearly equal and at most ``batch_size`` (if 1, some ranks may get 2)."""
    if batch_size < 1:
        raise ValueError(f"--data.batch_size {batch_size}: use 1 or more")
    if records < world_size:
        raise ValueError(
            f"{counted(records, 'training record')} cannot feed {world_size} ranks; "
            "use fewer devices"
        )
    return min(-(-records // (batch_size * world_size)), records // world_size)


def global_slice(records: int, batches: int, batch: int) -> tuple[int, int]:
    """Positions [start, end) of global batch ``batch`` in the epoch's order."""
    return batch * records // batches, (batch + 1) * records // batches


def rank_slice(start: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions [start, end) of one rank within a global batch."""
    count = end - start
    return start + rank * count // world_size, start + (rank + 1) * count // world_size


@dataclass(frozen=True)
class RankOptions:
    """How records are dealt out to this rank."""

    batch_size: int
    """Largest number of records in a batch on this rank."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    random_flip: bool = False
    on_error: OnError = "stop"
    """Stop at broken records, or leave them out and report them in each batch's ``skipped``."""


class RankBatches(Dataset[Batch | Exception], ABC):
    """Batches of one rank; ``batches[epoch, number]`` depends on nothing else."""

    def __init__(self, records: int, options: RankOptions) -> None:
        self.records = records
        self.batches = batches_per_epoch(records, options.batch_size, options.world_size)
        self._options = options

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, place: tuple[int, int]) -> Batch | Exception:
        """Batch or its error: raised in a worker, its traceback would fill a screen."""
        try:
            return self.batch(*place)
        except (ValueError, OSError) as error:
            return error

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        return (self.batch(0, number) for number in range(self.batches))

    @abstractmethod
    def batch(self, epoch: int, number: int) -> Batch:
        """Batch ``number`` of ``epoch``, both from 0."""

    def _slice(self, number: int) -> tuple[int, int, float]:
        first, last = global_slice(self.records, self.batches, number)
        world_size = self._options.world_size
        start, end = rank_slice(first, last, self._options.rank, world_size)
        return start, end, (end - start) * world_size / (last - first)


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, number) of the batches left; ``position`` returns (epoch, batches trained on)."""

    def __init__(self, batches: int, position: Callable[[], tuple[int, int]]) -> None:
        self._batches, self._position = batches, position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self._position()
        return ((epoch, number) for number in range(start, self._batches))


class EpochLoader:
    """Data loader that resumes within an epoch at ``position``, (epoch, batches trained on).

    ``count`` receives each batch before it is yielded. Lightning does not rewrap this loader.
    """

    def __init__(
        self,
        batches: RankBatches,
        num_workers: int,
        position: Callable[[], tuple[int, int]],
        count: Callable[[Batch], None],
    ) -> None:
        self._batches, self._num_workers, self._count = batches, num_workers, count
        self._sampler = EpochSampler(len(batches), position)
        self._loader: DataLoader[Batch | Exception] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Rest of the epoch; read lazily, as Lightning requests an iterator long before a batch."""
        if self._loader is None:
            self._loader = DataLoader(
                self._batches,
                batch_size=None,
                sampler=self._sampler,
                num_workers=self._num_workers,
                persistent_workers=self._num_workers > 0,
                pin_memory=torch.cuda.is_available(),
            )
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            self._count(batch)
            yield batch

    def close(self) -> None:
        """End the workers, which otherwise wait for the next epoch."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Empty (the trainer keeps the position); tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class EpochBatches(RankBatches):
    """Batches of a dataset folder; images are cached if all take at most ``cache_bytes``."""

    def __init__(self, folder: DatasetFolder, options: RankOptions, cache_bytes: int = 0) -> None:
        records = folder.part_records("train")
        super().__init__(len(records), options)
        self._reader = RecordReader(folder.path, records, folder.image_shape, cache_bytes)
        self._rows = torch.from_numpy(records["row"].to_numpy().copy())
        keys: list[str] = folder.items["image_key"].to_pylist()
        self._keys = [keys[row] for row in self._rows.tolist()]
        self._labels: torch.Tensor | None = None
        if folder.num_classes is not None:
            self._labels = torch.from_numpy(records["label"].to_numpy().copy())
        captions = records["caption"]
        self._captions = captions.combine_chunks() if captions.null_count == 0 else None
        self._epoch = -1

    def batch(self, epoch: int, number: int) -> Batch:
        """See :class:`RankBatches`."""
        if epoch != self._epoch:
            seed = self._options.seed
            self._order = permutation(self.records, seed, epoch)
            if self._options.random_flip:
                generator = generator_of(seed, epoch, Stream.FLIPS)
                self._flips = torch.from_numpy(generator.random(self.records) < 0.5)
            self._epoch = epoch
        start, end, weight = self._slice(number)
        skipped = Skipped() if self._options.on_error == "skip" else None
        broken = None if skipped is None else lambda number, message: skipped.record(message)
        numbers, pixels = _read(self._reader, self._order[start:end], broken)
        if skipped is not None:
            skipped.kept = len(numbers)
        if len(numbers) == 0:  # other ranks wait for this one: fill in a record without weight
            (numbers, pixels), weight = self._readable(end), 0.0
        batch = _batch(numbers, pixels, self._keys, self._rows, self._labels, self._captions)
        if self._options.random_flip:
            flips = self._flips[torch.from_numpy(numbers)][:, None, None, None]
            batch["image"] = torch.where(flips, batch["image"].flip(-1), batch["image"])
        batch["weight"] = weight
        if skipped is not None:
            batch["skipped"] = skipped
        return batch

    def _readable(self, position: int) -> tuple[np.ndarray, torch.Tensor]:
        for number in np.roll(self._order, -position):
            numbers, pixels = _read(self._reader, np.array([number]), lambda number, message: None)
            if len(numbers):
                return numbers, pixels
        raise ValueError("no training record can be read; prepare the dataset again")


def _read(
    reader: RecordReader, numbers: np.ndarray, broken: Callable[[int, str], None] | None
) -> tuple[np.ndarray, torch.Tensor]:
    if broken is None:
        return numbers, reader.read(numbers.tolist())
    lost: list[int] = []

    def leave_out(number: int, message: str) -> None:
        lost.append(number)
        broken(number, message)

    pixels = reader.read(numbers.tolist(), leave_out)
    return numbers[~np.isin(numbers, lost)], pixels


def _batch(
    numbers: np.ndarray,
    pixels: torch.Tensor,
    keys: list[str],
    rows: torch.Tensor,
    labels: torch.Tensor | None,
    captions: pa.Array | None,
) -> Batch:
    index = torch.from_numpy(numbers)
    batch: Batch = {
        "image": from_bytes(pixels),
        "key": [keys[number] for number in numbers.tolist()],
        "row": rows[index],
    }
    if labels is not None:
        batch["label"] = labels[index]
    if captions is not None:
        batch["caption"] = captions.take(numbers).to_pylist()
    return batch


class PartLoader:
    """Each distinct image of a part once, in order; ranks take turns."""

    def __init__(
        self, part: DatasetPart, batch_size: int, rank: int, world_size: int, on_error: OnError
    ) -> None:
        if len(part) < world_size:
            raise ValueError(
                f"{counted(len(part), f'{part.name} image')} cannot feed {world_size} ranks; use "
                "fewer devices, or no validation"
            )
        self._part, self._batch_size, self._on_error = part, batch_size, on_error
        self._captions = None if part.captions is None else pa.array(part.captions, pa.string())
        self._numbers = np.arange(rank, len(part), world_size)
        self._named: set[int] = set()

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """``image``, ``key``, ``row``; ``label`` and ``caption`` where the part has them."""
        part = self._part
        broken = self._name if self._on_error == "skip" else None
        for start in range(0, len(self._numbers), self._batch_size):
            numbers = self._numbers[start : start + self._batch_size]
            numbers, pixels = _read(part.reader, numbers, broken)
            if len(numbers):
                yield _batch(numbers, pixels, part.keys, part.rows, part.labels, self._captions)

    def _name(self, number: int, message: str) -> None:
        if number not in self._named:
            self._named.add(number)
            _log.warning("skipped %s", message)


class ForeignBatches(RankBatches):
    """Batches of one rank from shards without a manifest, in a new order each epoch.

    Shards are shuffled by (seed, epoch) and dealt out to all workers of all ranks; with fewer
    shards than workers, everyone reads all shards and takes every N-th record. A worker that runs
    out begins its shards again in another order. With the same ranks and workers, a resumed epoch
    continues where it stopped, after reading past the records that were trained on.
    """

    def __init__(self, shards: str, stream: StreamOptions, options: RankOptions) -> None:
        if stream.epoch_records < 1:
            raise ValueError(
                f"--data.path {shards} has no manifest, so its size is unknown: give "
                "--data.stream.epoch_records, or make a dataset folder with memfree prepare"
            )
        size = stream.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        if min(height, width) < 1:
            raise ValueError("--data.stream.image_size: give the height and width of the images")
        super().__init__(stream.epoch_records, options)
        self.missing, self.left_out = Skipped(), LeftOut()
        missing = self.missing if options.on_error == "skip" else None
        self._shards = expand_shards(shards, missing, self.left_out)
        self._labels = shard_labels(self._shards)
        self._stream = stream
        self._records_as = stream.records
        if not stream.captions:  # then it does not matter what is wrong with them
            self._records_as = replace(stream.records, caption_source="none")
        self._framing = Framing(height, width, stream.channels, stream.resize)
        self.image_shape = (int(stream.channels), height, width)
        self._next = (-1, -1)
        self._rest: Iterator[Batch] = iter(())

    def batch(self, epoch: int, number: int) -> Batch:
        """See :class:`RankBatches`; fast for the batches that this worker gets in turn."""
        worker = get_worker_info()
        workers = worker.num_workers if worker is not None else 1
        if (epoch, number) != self._next:
            self._rest = self._batches(epoch, number, workers)
        self._next = (-1, -1)  # an error ends the stream
        batch = next(self._rest)
        self._next = (epoch, number + workers)
        return batch

    def _batches(self, epoch: int, start: int, workers: int) -> Iterator[Batch]:
        first = start % workers
        unit = self._options.rank * workers + first
        skipped, left_out = Skipped(), LeftOut()
        records = self._records(epoch, unit, self._options.world_size * workers, skipped, left_out)
        generator = generator_of(self._options.seed, epoch, unit, Stream.STREAMED_FLIPS)
        for number in range(first, self.batches, workers):
            low, high, weight = self._slice(number)
            flips = generator.random(high - low) < 0.5
            if number < start:  # trained on before the run was stopped
                for _ in flips:
                    if self._options.on_error == "stop":  # none was broken: no need to decode
                        next(records)
                    else:
                        self._next_whole(records, skipped, left_out)
                skipped.take()
                continue
            whole = [self._next_whole(records, skipped, left_out) for _ in flips]
            skipped.kept += len(whole)
            batch = self._batch_of(whole, flips)
            batch["weight"] = weight
            if self._options.on_error == "skip":
                batch["skipped"] = skipped.take()
            batch["left_out"] = left_out.take()
            yield batch

    def _records(
        self, epoch: int, unit: int, units: int, skipped: Skipped, left_out: LeftOut
    ) -> Iterator[TarRecord]:
        shared = len(self._shards) < units
        # Where everyone reads all shards, only one counts broken records.
        counter = Skipped() if shared and unit else skipped
        handler = counter if self._options.on_error == "skip" else None

        def one_pass(turn: int) -> Iterator[TarRecord]:
            order = generator_of(self._options.seed, epoch, turn, Stream.SHARDS).permutation(
                len(self._shards)
            )
            shards = (order if shared else order[unit::units]).tolist()
            read = 0
            for shard in shards:
                records = read_shard(
                    self._shards[shard],
                    handler,
                    left_out,
                    self._records_as,
                    "--data.stream.records.",
                    self._labels[shard],
                )
                for number, record in enumerate(records):
                    read += 1
                    if not shared or (number + turn) % units == unit:
                        yield record
            if not read:
                first = f"; first {counter.messages[0]}" if counter.messages else ""
                other = f"; {left_out.text()}" if left_out else ""
                raise ValueError(
                    f"no readable record in {counted(len(shards), 'shard')}{first}{other}"
                )

        buffer = max(self._stream.shuffle_buffer, 1)
        for turn in count():
            rng = buffer_random(self._options.seed, epoch, turn, unit)
            yield from shuffle(buffer, initial=buffer, rng=rng)(one_pass(turn))

    def _next_whole(
        self, records: Iterator[TarRecord], skipped: Skipped, left_out: LeftOut
    ) -> tuple[TarRecord, np.ndarray]:
        while True:
            record = next(records)
            try:
                return record, self._decode(record, left_out)
            except ValueError as error:
                if self._options.on_error == "stop":
                    raise
                skipped.record(str(error))

    def _batch_of(self, whole: list[tuple[TarRecord, np.ndarray]], flips: np.ndarray) -> Batch:
        images = [
            pixels[:, :, ::-1] if self._options.random_flip and flip else pixels
            for (_, pixels), flip in zip(whole, flips, strict=True)
        ]
        batch: Batch = {
            "image": from_bytes(torch.from_numpy(np.stack(images))),
            "key": [record.image_key or record.name for record, _ in whole],
            "row": torch.full((len(whole),), -1),
        }
        if self._stream.num_classes:
            batch["label"] = torch.tensor([record.label for record, _ in whole])
        if self._stream.captions:
            batch["caption"] = [record.caption for record, _ in whole]
        return batch

    def _decode(self, record: TarRecord, left_out: LeftOut) -> np.ndarray:
        classes = self._stream.num_classes
        if classes and (record.label is None or record.label >= classes):
            raise ValueError(f"{record.name}: class {record.label} is not in 0..{classes - 1}")
        if self._stream.captions and record.caption is None:
            raise ValueError(f"{record.name}: record without a caption")
        image = open_image(record.image, record.name)
        if frames := further_frames(image):
            left_out.at(record.name)(f"{record.name}: {counted(frames, 'further frame')}")
        return self._framing.apply(image, record.name, self._framing)
