"""Index folder: saving, loading and hashing a reference index."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from memfree.folders.atomic import (
    check_free_space,
    put_in_place,
    unfinished,
    write_atomic,
    write_json,
)
from memfree.folders.claim import Found, claim
from memfree.folders.manifest import (
    block_checksums,
    read_manifest,
    save_config,
    sha256,
    write_manifest,
)
from memfree.folders.untrusted import (
    Maybe,
    Number,
    check_fields,
    check_plain,
    read_json,
    read_table,
    short,
)
from memfree.retrieval.features.base import Features, PixelFeatures, identity, unreadable
from memfree.retrieval.features.make import features_from
from memfree.retrieval.items import CONDITIONS, Items, conditions_table

SKIP_VARIABLE = "MEMFREE_SKIP_CHECKSUMS"
_SHORTEST_SALT = 16  # characters: with fewer, keys can be found out by trying salts
_LONGEST_SALT = 1 << 16  # bytes of its file
_LABEL_BYTES = 1 << 30  # limit on the counts of all labels, for a small index
_CHECKED = 1 << 24  # numbers checked at a time
_NULLABLE = ("shard", "content", "label", "caption")
ITEMS = pa.schema(
    [
        ("row", pa.int64()),
        ("image_key", pa.string()),
        ("group", pa.int64()),
        ("multiplicity", pa.int64()),
        ("shard", pa.string()),
        ("content", pa.string()),
    ]
)
HASHED_FILES = ("items.parquet", "conditions.parquet", "features.safetensors")
_COUNT = Number(1, (1 << 40) - 1, whole=True)
_MANIFEST = {
    "rows": _COUNT,
    "dimension": _COUNT,
    "groups": _COUNT,
    "files": {str: str},
    "features": dict,
    "image_shape": [Number(1, 1 << 20, whole=True)],
    "num_classes": Maybe(Number(1, 1 << 20, whole=True)),
    "dataset_hash": Maybe(str),
}


@dataclass(frozen=True)
class Stored:
    """Contents of an index folder: the arguments of ``ReferenceIndex``."""

    vectors: Tensor
    features: Features
    items: Items
    image_shape: tuple[int, int, int]
    dataset_hash: str | None
    calibrations: dict[str, dict[str, Any]]


def hashed_key(key: str, salt: str) -> str:
    """HMAC-SHA256 of an image key under the owner's salt, as hexadecimal digits. Salt and list of
    keys reveal the key of a hit; nobody else can tell whether a key is indexed."""
    return hmac.new(salt.encode(), key.encode(), hashlib.sha256).hexdigest()


def read_salt(path: Path) -> str:
    """Read a file's salt; a new file gets a random one, readable by its owner."""
    if not os.path.lexists(path):

        def write(temporary: Path) -> None:
            temporary.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")

        write_atomic(path, write, mode=0o600)
    check_plain(path)
    if path.stat().st_size > _LONGEST_SALT:
        raise ValueError(f"{path} is not a salt: it has more than {_LONGEST_SALT} bytes")
    return path.read_text(encoding="utf-8").strip()


def hashed(
    items: Items, features: Features, salt: str, keep_captions: bool, keep_shards: bool
) -> Items:
    """Items without what names their images; see ``ReferenceIndex.hashed``."""
    if len(salt) < _SHORTEST_SALT:
        raise ValueError(f"the salt has {len(salt)} characters; use {_SHORTEST_SALT} or more")
    if features.reveals_images:
        raise ValueError(
            f"an index of {features.describe()['name']} features shows its images whatever "
            "its keys are; index them by another extractor, as SSCD"
        )
    keys = [hashed_key(key, salt) for key in items.keys]
    totals: Counter[tuple[int, int | None, str | None]] = Counter()
    for condition in items.conditions.to_pylist():
        caption = condition["caption"] if keep_captions else None
        if condition["label"] is not None or caption is not None:
            totals[condition["row"], condition["label"], caption] += condition["count"]
    # Drop content hashes too: anybody could compute them from an image.
    return Items(
        keys,
        items.group.cpu(),
        items.multiplicity.cpu(),
        conditions_table(totals, keys),
        items.num_classes,
        list(items.shards) if keep_shards else [],
    )


def _notice(features: Features) -> str:
    if isinstance(features, PixelFeatures):
        held = "the training images themselves"
    elif features.reveals_images:
        held = "what the training images can be decoded from"
    else:
        held = "features computed from training images"
    return f"vectors.npy holds {held}; treat it like the training set"


def save(index: Stored, folder: Path, overwrite: bool = False) -> None:
    """Write an index folder beside its place, then rename it there; it replaces an index of the
    same data, and with ``overwrite`` one of other data, but nothing else."""
    folder = folder.absolute()
    vectors, items, content_hash = index.vectors, index.items, None
    if index.dataset_hash is None:  # tells indexes of bare tensors apart
        digest = hashlib.sha256(json.dumps(items.keys).encode())
        for value in (items.group, items.multiplicity, *vectors.split(4096)):
            digest.update(value.cpu().contiguous().numpy().tobytes())
        content_hash = digest.hexdigest()
    features = index.features.describe()
    claim_index(folder, index.dataset_hash or content_hash, features, overwrite)
    check_free_space(folder, vectors.numel() * 4 + 100 * len(vectors) + (1 << 20))
    with unfinished(folder) as partial:
        _write_arrays(index, partial)
        write_json(partial / "calibration.json", _sealed(index.calibrations))
        save_config(partial)
        write_manifest(
            partial,
            "index",
            contains_training_data=_notice(index.features),
            rows=len(vectors),
            groups=int(items.group.max()) + 1,
            records=int(items.multiplicity.sum()),
            dimension=vectors.shape[1],
            metric=index.features.metric,
            features=features,
            image_shape=list(index.image_shape),
            num_classes=items.num_classes,
            dataset_hash=index.dataset_hash,
            content_hash=content_hash,
            vectors_crc32=block_checksums(partial / "vectors.npy"),
            files={
                name: sha256(partial / name) for name in HASHED_FILES if (partial / name).exists()
            },
        )
        put_in_place(partial, folder, overwrite=True)


def _write_arrays(index: Stored, folder: Path) -> None:
    # Not through a memory map: on a full disk a signal would end the process.
    with open(folder / "vectors.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(index.vectors.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in index.vectors.split(4096):
            file.write(part.cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
    items = index.items
    rows = pa.table(
        {
            "row": range(len(index.vectors)),
            "image_key": items.keys,
            "group": items.group.cpu().numpy(),
            "multiplicity": items.multiplicity.cpu().numpy(),
            "shard": items.shards,
            "content": items.contents,
        },
        schema=ITEMS,
    )
    pq.write_table(rows, folder / "items.parquet")
    pq.write_table(items.conditions, folder / "conditions.parquet")
    tensors = {name: value.cpu().contiguous() for name, value in index.features.tensors().items()}
    if tensors:
        safetensors.torch.save_file(tensors, folder / "features.safetensors")


def claim_index(
    out: Path, images_hash: str | None, features: dict[str, Any], overwrite: bool
) -> Found:
    """Accept ``out`` as the place of an index; ValueError if it holds something else, or, without
    ``overwrite``, an index of other images or features."""
    identity_here = _made_from({"dataset_hash": images_hash, "features": features})
    return claim(out, "index", None if overwrite else identity_here, overwrite, _made_from)


def _made_from(manifest: dict[str, Any]) -> dict[str, Any]:
    images, features = manifest.get("dataset_hash"), manifest.get("features")
    return {
        "dataset_sha256": manifest.get("content_hash") if images is None else images,
        "features": identity(features if isinstance(features, dict) else {}),
    }


def save_calibrations(folder: Path, calibrations: dict[str, dict[str, Any]]) -> None:
    """Replace ``calibration.json`` of a finished index folder."""
    read_manifest(folder, "index")
    write_json(folder / "calibration.json", _sealed(calibrations))


def calibration_hash(name: str, record: dict[str, Any]) -> str:
    """SHA-256 of a record of ``calibration.json``, without its own hash."""
    rest = {field: value for field, value in record.items() if field != "sha256"}
    return hashlib.sha256(json.dumps([name, rest], sort_keys=True).encode()).hexdigest()


def _sealed(calibrations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add a hash to each record, as the file is replaced alone, without the manifest."""
    return {
        name: {**record, "sha256": calibration_hash(name, record)}
        for name, record in calibrations.items()
    }


def load(
    folder: Path, weights: Path | None = None, trust_file: bool = False, verify: bool = True
) -> Stored:
    """Open an index folder. Nothing in it is executed; sizes are checked before allocation.

    Args:
        weights: where moved weights of the extractor are now; they must be the same.
        trust_file: run the TorchScript file of an SSCD extractor whatever its hash is.
        verify: read the vectors once and compare checksums, at disk speed. The environment variable
            ``MEMFREE_SKIP_CHECKSUMS=1`` turns it off in every command.
    """
    manifest = read_manifest(folder, "index")
    check_fields(manifest, _MANIFEST, f"{folder}/manifest.json")
    rows, dimension, shape = manifest["rows"], manifest["dimension"], manifest["image_shape"]
    for name, digest in manifest["files"].items():
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
        with unreadable(f"{folder}/features.safetensors cannot be read"):
            tensors = safetensors.torch.load_file(folder / "features.safetensors")
    try:
        features = features_from(manifest["features"], tensors, weights, trust_file)
    except (ValueError, OSError) as error:
        if type(error) is FileNotFoundError:  # says itself which weights are not in place
            raise
        raise ValueError(f"{folder}: {short(error, 600)}") from error
    if len(shape) != 3:
        raise ValueError(f"{folder}/manifest.json.image_shape has not 3 numbers: {short(shape)}")
    if isinstance(features, PixelFeatures) and math.prod(shape) != dimension:
        raise ValueError(
            f"{folder}/manifest.json: images of {shape} cannot have vectors of {dimension}"
        )
    vectors = _map_vectors(folder / "vectors.npy", rows, dimension)
    if verify and not os.environ.get(SKIP_VARIABLE):
        _verify_vectors(folder / "vectors.npy", vectors, manifest.get("vectors_crc32"))
    return Stored(
        vectors,
        features,
        _read_items(folder, rows, manifest["groups"], manifest.get("num_classes")),
        (shape[0], shape[1], shape[2]),
        manifest.get("dataset_hash"),
        # Records of earlier versions have no hash.
        _read_calibrations(folder / "calibration.json", hashed="vectors_crc32" in manifest),
    )


def _map_vectors(path: Path, rows: int, dimension: int) -> Tensor:
    try:
        check_plain(path)
        # Copy-on-write: torch wants a writable array, the file stays as it is.
        array = np.lib.format.open_memmap(path, mode="c")
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is damaged: {path.name} is missing") from None
    except OSError as error:  # a bad sector
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # numpy parses the header as Python
        raise ValueError(
            f"{path} is not a plain float32 array of {rows} rows and {4 * rows * dimension} bytes: "
            f"{short(error)}"
        ) from error
    if array.shape != (rows, dimension) or array.dtype != "<f4" or not array.flags.c_contiguous:
        raise ValueError(
            f"{path} holds {short(array.dtype)} {short(array.shape)}, but manifest.json says "
            f"float32 {(rows, dimension)}"
        )
    if (size := path.stat().st_size) != array.offset + array.nbytes:
        raise ValueError(
            f"{path} has {size} bytes, but {array.offset + array.nbytes} are needed: it is damaged"
        )
    return torch.from_numpy(array)


def _verify_vectors(path: Path, vectors: Tensor, expected: Any) -> None:
    if expected is not None and block_checksums(path) != expected:
        raise ValueError(
            f"{path} is damaged: it does not have the checksums of manifest.json; build the index "
            "again"
        )
    for part in vectors.split(max(1, _CHECKED // vectors.shape[1])):
        if not all(bool(end.isfinite()) for end in torch.aminmax(part)):
            raise ValueError(f"{path} holds NaN or infinite values; build the index again")


def _read_items(folder: Path, rows: int, groups: int, num_classes: int | None) -> Items:
    size = (folder / "vectors.npy").stat().st_blocks * 512  # allocated, not just declared
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
        rows * (num_classes or 0) * 8 <= _LABEL_BYTES + 1000 * size
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
    contents = table["content"].to_pylist() if "content" in table.column_names else []
    return Items(keys, group, multiplicity, conditions, num_classes, shards, contents)


def _read_table(path: Path, schemas: list[pa.Schema]) -> pa.Table:
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
        digest = record.pop("sha256", None)
        if (hashed or digest is not None) and digest != calibration_hash(name, record):
            raise ValueError(
                f"{path} is damaged: {short(name, 60)} does not have its SHA-256; calibrate again"
            )
    return value
