"""Sample folder: read images, seeds, conditions and trace by index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from memfree.data.tar_record import MAX_TEXT_BYTES
from memfree.folders.manifest import read_manifest
from memfree.folders.untrusted import parse_json, read_table, short
from memfree.images import MAX_IMAGE_BYTES, MAX_PIXELS, from_bytes, from_png, png_size

_TRACE = {"sample": pa.int64(), "step": pa.int64()}
_INT64 = range(-(1 << 63), 1 << 63)
_DAMAGE = (tarfile.TarError, EOFError, KeyError, ValueError, OverflowError, RecursionError)


class SampleFolder:
    """A finished folder of samples, in index order; ValueError if it is anything else.

    Attributes:
        manifest: mitigation, seed, count, guidance_scale, steps, scheduler, seconds,
            seconds_per_sample, peak_memory_bytes, dataset_hash and the settings of the run.
        image_shape: (C, H, W).
        index: sample indices, (N,) int64: 0 to N − 1.
        seeds: seed of the run that drew each, (N,) int64.
        conditions: labels, (N,) int64; None for an unconditional run.
        captions: the N prompts; None for a pixel model.
        records: pyarrow table of the JSON beside each sample.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path, "samples")
        try:
            self.manifest: dict[str, Any] = {**manifest, "seed": manifest["made_by"]["seed"]}
            channels, height, width = (int(side) for side in manifest["image_shape"])
            if channels not in (1, 3) or min(height, width) < 1 or height * width > MAX_PIXELS:
                raise ValueError(f"impossible image_shape {short(manifest['image_shape'])}")
            count = int(manifest["count"])
            self._shards = [self.path / _shard_name(name) for name in manifest["shards"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            lacks = isinstance(error, KeyError)
            what = f"lacks {error}" if lacks else f"is damaged ({short(error)})"
            message = f"{self.path}/manifest.json {what}; draw the samples again"
            raise ValueError(message) from error
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        records: dict[int, dict[str, Any]] = {}
        self._places: dict[int, tuple[Path, int, int]] = {}
        for shard in self._shards:
            for record, offset, size in _scan(shard):
                if record["index"] in records:
                    raise ValueError(f"{shard} repeats sample {record['index']}")
                records[record["index"]] = record
                self._places[record["index"]] = (shard, offset, size)
        if len(records) != count or sorted(records) != list(range(count)):
            raise ValueError(
                f"{self.path} holds {len(records)} of {count} samples; draw them again"
            )
        ordered = [records[i] for i in range(len(records))]
        self.records: pa.Table = _table(ordered, self.path)
        self.index = torch.arange(len(ordered))
        self.seeds = torch.tensor([record["seed"] for record in ordered], dtype=torch.int64)
        given = [record["condition"] for record in ordered]
        labelled, prompted = (all(isinstance(c, kind) for c in given) for kind in (int, str))
        labels = torch.tensor(given, dtype=torch.int64) if labelled else None
        self.conditions: Tensor | None = labels
        self.captions: list[str] | None = given if prompted else None

    def __len__(self) -> int:
        return len(self.index)

    def images(self) -> Tensor:
        """All samples, (N, C, H, W) float32 in [-1, 1]."""
        return torch.cat(list(self.batches(1024)))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The samples in order, (b, C, H, W) float32 in [-1, 1] at a time."""
        for indices in self.index.split(batch_size):
            yield from_bytes(torch.stack([self._image(int(i)) for i in indices]))

    def _image(self, index: int) -> Tensor:
        shard, offset, size = self._places[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        size_in_header = png_size(data)
        if size_in_header not in (None, self.image_shape[1:]):
            sizes = ["x".join(map(str, size)) for size in (size_in_header, self.image_shape[1:])]
            raise ValueError(
                f"{shard}: sample {index} has {sizes[0]} pixels, but the manifest says {sizes[1]}"
            )
        try:
            if size_in_header is None:
                raise ValueError("not a PNG")
            return from_png(data, self.image_shape[0])
        except ValueError as error:
            raise ValueError(f"{shard}: the image of sample {index} is damaged") from error

    def trace(self) -> pa.Table:
        """Rows of σ_t, λ_t and so on, by sample and step; ValueError if drawn without an index."""
        names = [self.path / f"trace-{shard.stem[8:]}.parquet" for shard in self._shards]
        if not any(name.is_file() for name in names):
            raise ValueError(
                f"{self.path} has no trace: sample with --index to observe the similarity"
            )
        try:
            whole = pa.concat_tables([read_table(name, _TRACE) for name in names])
        except (OSError, ValueError) as error:
            raise ValueError(f"a trace in {self.path} cannot be read: {short(error)}") from error
        return whole.sort_by([("sample", "ascending"), ("step", "ascending")])


def read_records(shards: Sequence[Path]) -> pa.Table:
    """Records of the samples in some shards, one row each, in no fixed order."""
    records = [record for shard in shards for record, _, _ in _scan(shard)]
    return _table(records, shards[0].parent if shards else Path())


def _table(records: list[dict[str, Any]], folder: Path) -> pa.Table:
    try:
        return pa.Table.from_pylist(records)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the records in {folder} do not fit together: {short(error)}") from error


def _shard_name(name: Any) -> str:
    """Refuses a path to a file elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or not name.startswith("samples-"):
        raise ValueError(f"{short(repr(name))} is not a shard")
    return name


def _scan(shard: Path) -> list[tuple[dict[str, Any], int, int]]:
    """For each sample its record, and the offset and size in bytes of its PNG in the tar."""
    if not shard.is_file():
        raise ValueError(f"{shard} is missing; draw the samples again")
    places: dict[str, tuple[int, int]] = {}
    records: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                limit = {"png": MAX_IMAGE_BYTES, "json": MAX_TEXT_BYTES}.get(kind)
                if limit is None:
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise ValueError(f"{member.name} is not a plain file")
                if not 0 < member.size <= limit:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                if kind == "png":
                    places[key] = (member.offset_data, member.size)
                else:
                    file = tar.extractfile(member)
                    assert file is not None
                    records[key] = _record(member.name, parse_json(file.read()))
        return [(records[key], *place) for key, place in places.items()]
    except _DAMAGE as error:
        raise ValueError(f"{shard} is damaged: {short(error)}") from error


def _record(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a record of a sample")
    for field, kind in (("index", int), ("seed", int), ("condition", (int, str, NoneType))):
        given = value.get(field, ...)
        too_large = isinstance(given, int) and given not in _INT64
        if not isinstance(given, kind) or isinstance(given, bool) or too_large:
            raise ValueError(f"{name} has no valid {field}")
    return value
