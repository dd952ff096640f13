"""Training batches streamed from WebDataset tars that have no index, near or remote."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from torch.utils.data import get_worker_info
from webdataset.filters import _shuffle

from memfree.data.decode import further_frames, open_image
from memfree.data.folder import to_float
from memfree.data.framing import Framing
from memfree.data.names import shard_labels
from memfree.data.options import OnError, StreamOptions
from memfree.data.order import global_slice, rank_slice
from memfree.data.rank_batches import Batch, RankBatches
from memfree.data.skipped import LeftOut, Skipped
from memfree.data.tarrecord import TarRecord
from memfree.data.tarstream import expand_shards, read_shard
from memfree.data.wording import counted


class ForeignBatches(RankBatches):
    """Batches of one rank, drawn from shards in an order of their own each epoch.

    The shards are shuffled by (seed, epoch) and dealt out to all workers of all ranks; where there
    are fewer shards than these, everyone reads all shards and takes every so-many-th record. A
    worker whose shards end before its share of the epoch begins them again in another order. All
    ranks get the same number of batches. Order depends on the number of ranks and workers, but not
    on time: with the same ranks and workers a resumed epoch continues with the batches that were
    left. Those before are read again, and decoded too where broken records are left out.

    Args:
        shards: see :func:`memfree.data.tarstream.expand_shards`.
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
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch, unit, 9]))
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
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch, turn, 10]))
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
            rng = random.Random(f"{self._seed} {epoch} {turn} {unit}")
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
            "image": to_float(torch.from_numpy(np.stack(images))),
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
