"""Opening an index folder: memory-mapped, and checked before it is believed."""

from __future__ import annotations

import math
import os
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from memfree.folders.hashes import block_checksums, sha256
from memfree.folders.manifest import read_manifest
from memfree.retrieval.extractors import features_from
from memfree.retrieval.features import PixelFeatures
from memfree.retrieval.index import ReferenceIndex
from memfree.retrieval.items import CONDITIONS, Items
from memfree.retrieval.storage import HASHED_FILES, ITEMS, calibration_hash
from memfree.untrusted import read_json, read_table, short

_LABEL_BYTES = 1 << 30  # that the counts of all labels may take beside a small index
_CHECKED = 1 << 24  # numbers looked at in one go
SKIP_VARIABLE = "MEMFREE_SKIP_CHECKSUMS"
_NULLABLE = ("shard", "content", "label", "caption")


def load(
    folder: Path, weights: Path | None = None, trust_file: bool = False, verify: bool = True
) -> ReferenceIndex:
    """Open an index folder. Nothing in it is executed, and sizes are checked before allocation.

    Args:
        folder: what ``save`` wrote.
        weights: where the extractor's file or folder is now, if not where it was at building; it
            must have the same weights.
        trust_file: run the TorchScript file of an SSCD extractor whatever its hash is.
        verify: read the vectors once and compare their checksums, at the speed of the disk. The
            environment variable ``MEMFREE_SKIP_CHECKSUMS=1`` leaves it out in every command.

    Raises:
        FileNotFoundError: there is no such folder, or the extractor's weights are not in place.
        ValueError: it is unfinished, damaged, of another kind, or its files contradict each other.
    """
    manifest = read_manifest(folder, "index")
    rows, dimension, groups = (_size(manifest, folder, x) for x in ("rows", "dimension", "groups"))
    for name, digest in _field(manifest, folder, "files", dict).items():
        if name not in HASHED_FILES:
            raise ValueError(
                f"{folder}/manifest.json names a file {short(repr(name))} that no index has"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing; build the index again")
        if sha256(folder / name) != digest:
            raise ValueError(
                f"{folder}/{name} is not the file that manifest.json describes; "
                "build the index again"
            )
    tensors = {}
    if "features.safetensors" in manifest["files"]:
        try:
            tensors = safetensors.torch.load_file(folder / "features.safetensors")
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder}/features.safetensors cannot be read: {short(error)}"
            ) from error
    description = _field(manifest, folder, "features", dict)
    try:
        features = features_from(description, tensors, weights, trust_file)
    except (ValueError, OSError) as error:
        if type(error) is FileNotFoundError:  # says itself which weights are not in place
            raise
        raise ValueError(f"{folder}: {short(error, 600)}") from error
    shape = _field(manifest, folder, "image_shape", list)
    if len(shape) != 3 or not all(type(size) is int and 0 < size <= 1 << 20 for size in shape):
        raise ValueError(f"{folder}/manifest.json has an impossible image_shape {short(shape)}")
    if isinstance(features, PixelFeatures) and math.prod(shape) != dimension:
        raise ValueError(
            f"{folder}/manifest.json: images of {shape} cannot have vectors of {dimension}"
        )
    vectors = _map_vectors(folder / "vectors.npy", rows, dimension)
    if verify and not os.environ.get(SKIP_VARIABLE):
        _verify_vectors(folder / "vectors.npy", vectors, manifest.get("vectors_crc32"))
    items = _read_items(folder, rows, groups, manifest.get("num_classes"))
    return ReferenceIndex(
        vectors,
        features,
        items,
        (shape[0], shape[1], shape[2]),
        manifest.get("dataset_hash"),
        # Records of earlier versions have no hash.
        _read_calibrations(folder / "calibration.json", hashed="vectors_crc32" in manifest),
    )


def _map_vectors(path: Path, rows: int, dimension: int) -> Tensor:
    """Memory-map the (rows, dimension) float32 array if its header and size say just that."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no plain file")
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is damaged: vectors.npy is missing") from None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is not a plain float32 array: {short(error)}") from error
    except tokenize.TokenError as error:  # numpy's second look at a header that is no literal
        raise ValueError(f"{path} is not a plain float32 array: {short(error)}") from error
    except OSError as error:  # a bad sector
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if shape != (rows, dimension) or fortran or dtype != np.dtype("<f4"):
        raise ValueError(
            f"{path} holds {short(dtype)} {short(shape)}, but manifest.json says float32 "
            f"{(rows, dimension)}"
        )
    if size != offset + 4 * rows * dimension:
        raise ValueError(
            f"{path} has {size} bytes, but {offset + 4 * rows * dimension} are needed: it is "
            "truncated or damaged"
        )
    # Copy-on-write: torch wants a writable array, the file stays as it is.
    try:
        array = np.memmap(path, dtype="<f4", mode="c", offset=offset, shape=shape)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{path} of {size} bytes cannot be mapped: {short(error)}") from error
    return torch.from_numpy(array)


def _verify_vectors(path: Path, vectors: Tensor, expected: Any) -> None:
    """Compare the file's checksums; indexes of earlier versions have none.

    Raises:
        ValueError: a bit of it has changed, or a number is not finite.
    """
    if expected is not None and block_checksums(path) != expected:
        raise ValueError(
            f"{path} is damaged: it does not have the checksums of manifest.json; build the index "
            "again"
        )
    for part in vectors.split(max(1, _CHECKED // vectors.shape[1])):
        if not all(bool(end.isfinite()) for end in torch.aminmax(part)):
            raise ValueError(f"{path} holds NaN or infinite values; build the index again")


def _read_items(folder: Path, rows: int, groups: int, num_classes: Any) -> Items:
    size = (folder / "vectors.npy").stat().st_blocks * 512  # what is really there
    # Indexes of memfree's first version do not know their rows' contents.
    table = _read_table(folder / "items.parquet", [ITEMS, ITEMS.remove(5)])
    if table.num_rows != rows:
        raise ValueError(
            f"{folder}/items.parquet has {table.num_rows} rows, but manifest.json says {rows}"
        )
    conditions = _read_table(folder / "conditions.parquet", [CONDITIONS])
    group = torch.from_numpy(table["group"].to_numpy().astype(np.int64))
    multiplicity = torch.from_numpy(table["multiplicity"].to_numpy().astype(np.int64))
    labels, at = conditions["label"].drop_null().to_numpy(), conditions["row"].to_numpy()
    sound = (
        (num_classes is None or (type(num_classes) is int and 0 < num_classes <= 1 << 20))
        and rows * (num_classes or 0) * 8 <= _LABEL_BYTES + 1000 * size
        and int(group.min()) >= 0
        and int(group.max()) < groups
        and len(group.unique()) == groups
        and int(multiplicity.min()) >= 1
        and bool(((at >= 0) & (at < rows)).all())
        and bool((conditions["count"].to_numpy() >= 1).all())
        and (num_classes is None or bool(((labels >= 0) & (labels < num_classes)).all()))
    )
    if not sound:
        raise ValueError(
            f"{folder}: items.parquet or conditions.parquet contradict manifest.json; "
            "build the index again"
        )
    keys, shards = table["image_key"].to_pylist(), table["shard"].to_pylist()
    contents = table["content"].to_pylist() if "content" in table.column_names else None
    return Items(keys, group, multiplicity, conditions, num_classes, shards, contents)


def _read_table(path: Path, schemas: list[pa.Schema]) -> pa.Table:
    """Read a parquet file of exactly one of these schemas."""
    try:
        table = read_table(path, schemas[-1], _NULLABLE)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is damaged: {path.name} is missing") from None
    if not any(table.schema.equals(schema) for schema in schemas):
        names = short(", ".join(table.column_names))
        raise ValueError(f"{path} is not an index's {path.stem} table: its columns are {names}")
    return table


def _read_calibrations(path: Path, hashed: bool) -> dict[str, dict[str, Any]]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is damaged: {path.name} is missing") from None
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise ValueError(f"{path} does not hold one record a similarity")
    for name, record in value.items():
        found = record.pop("sha256", None)
        if (hashed or found is not None) and found != calibration_hash(name, record):
            raise ValueError(
                f"{path} is damaged: {short(name, 60)} does not have its SHA-256; calibrate again"
            )
    return value


def _field(manifest: dict[str, Any], folder: Path, name: str, kind: type) -> Any:
    value = manifest.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{folder}/manifest.json has no valid {name!r}")
    return value


def _size(manifest: dict[str, Any], folder: Path, name: str) -> int:
    value = _field(manifest, folder, name, int)
    if not 1 <= value < 1 << 40 or isinstance(value, bool):
        raise ValueError(f"{folder}/manifest.json has an impossible {name}: {short(value)}")
    return value
