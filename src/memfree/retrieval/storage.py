"""Writing an index folder: in one step, and never over something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch

from memfree.folders.atomic_files import write_json
from memfree.folders.hashes import block_checksums, sha256
from memfree.folders.manifest import read_manifest, write_manifest
from memfree.folders.resolved import save_config
from memfree.folders.storage_errors import check_free_space
from memfree.folders.whole_folder import check_place, put_in_place, unfinished
from memfree.retrieval.features import Features, PixelFeatures, identity

if TYPE_CHECKING:
    from memfree.retrieval.index import ReferenceIndex

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


def _notice(features: Features) -> str:
    if isinstance(features, PixelFeatures):
        held = "the training images themselves"
    elif features.reveals_images:
        held = "what the training images can be decoded from"
    else:
        held = "features computed from training images"
    return f"vectors.npy holds {held}; treat it like the training set"


def content_hash(index: ReferenceIndex) -> str | None:
    """SHA-256 that tells indexes of bare images apart; None where the dataset's hash does."""
    if index.dataset_hash is not None:
        return None
    digest = hashlib.sha256(json.dumps(index.keys).encode())
    for value in (index.group, index.multiplicity, *index.vectors.split(4096)):
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(index: ReferenceIndex, folder: Path, overwrite: bool = False) -> None:
    """Write an index folder beside its place, then rename it there.

    An index of the same data in the same place is replaced.

    Args:
        index: what to write.
        folder: where; must not exist, be empty, or hold an index.
        overwrite: also replace an index of other data.

    Raises:
        ValueError: the folder holds something else, or another index and not ``overwrite``.
        OSError: the disk has too little room.
    """
    folder = folder.absolute()
    check_replaceable(
        folder, index.dataset_hash, index.features.describe(), overwrite, content_hash(index)
    )
    check_free_space(folder, index.vectors.numel() * 4 + 100 * len(index) + (1 << 20))
    with unfinished(folder) as partial:
        _write(index, partial)
        put_in_place(partial, folder, overwrite=True)


def _write(index: ReferenceIndex, folder: Path) -> None:
    # Not through a memory map: where the disk becomes full, that ends the process by a signal.
    with open(folder / "vectors.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(index.vectors.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in index.vectors.split(4096):
            file.write(part.cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
    items = index.items
    rows = pa.table(
        {
            "row": range(len(index)),
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
    write_json(folder / "calibration.json", _sealed(index.calibrations))
    save_config(folder)
    write_manifest(
        folder,
        "index",
        contains_training_data=_notice(index.features),
        rows=len(index),
        groups=int(index.group.max()) + 1,
        records=int(index.multiplicity.sum()),
        dimension=index.vectors.shape[1],
        metric=index.metric,
        features=index.features.describe(),
        image_shape=list(index.image_shape),
        num_classes=index.num_classes,
        dataset_hash=index.dataset_hash,
        content_hash=content_hash(index),
        vectors_crc32=block_checksums(folder / "vectors.npy"),
        files={name: sha256(folder / name) for name in HASHED_FILES if (folder / name).exists()},
    )


def check_replaceable(
    folder: Path,
    dataset_hash: str | None,
    features: dict[str, Any],
    overwrite: bool,
    content: str | None = None,
) -> None:
    """Refuse to write an index where something else is.

    Args:
        folder: where the index shall be.
        dataset_hash: of its dataset folder, None for an index of tensors.
        features: ``describe()`` of its features.
        overwrite: allow it to replace an index of other data or features.
        content: its ``content_hash``, which tells indexes of tensors apart.

    Raises:
        ValueError: the folder holds something else, or such an index and not ``overwrite``.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        check_place(folder)
        return
    if not folder.is_dir():
        raise ValueError(f"cannot write an index to {folder}: it is a file")
    old = read_manifest(folder, "index")
    if overwrite:
        check_place(folder)
        return
    if difference := _difference(old, dataset_hash, features, content):
        raise ValueError(
            f"{folder} holds the index {difference}; choose another --out or give --overwrite true"
        )


def is_written(folder: Path, dataset_hash: str | None, features: dict[str, Any]) -> bool:
    """Whether the finished index of this dataset and these features is there."""
    if not (folder / "manifest.json").is_file():
        return False
    return _difference(read_manifest(folder, "index"), dataset_hash, features, None) is None


def _difference(
    old: dict[str, Any], dataset_hash: str | None, features: dict[str, Any], content: str | None
) -> str | None:
    """What an index with this manifest is of, if not of these images and features."""
    same = old.get("dataset_hash") == dataset_hash and (
        dataset_hash is not None or old.get("content_hash") == content
    )
    if same and identity(old.get("features") or {}) == identity(features):
        return None
    return "of other features" if same else "of another dataset"


def save_calibrations(folder: Path, calibrations: dict[str, dict[str, Any]]) -> None:
    """Replace ``calibration.json`` of a finished index folder."""
    read_manifest(folder, "index")
    write_json(folder / "calibration.json", _sealed(calibrations))


def calibration_hash(name: str, record: dict[str, Any]) -> str:
    """SHA-256 of a record of ``calibration.json``, without the one that stands in it."""
    rest = {field: value for field, value in record.items() if field != "sha256"}
    return hashlib.sha256(json.dumps([name, rest], sort_keys=True).encode()).hexdigest()


def _sealed(calibrations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records with their hashes; the file is replaced alone, so its hash stands in itself."""
    return {
        name: {**record, "sha256": calibration_hash(name, record)}
        for name, record in calibrations.items()
    }
