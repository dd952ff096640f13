"""The identity of a dataset, and of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memfree.data.sources import SourceImage


def dataset_hash(
    shards: dict[str, str], keys: list[str], groups: list[str], copies: list[int]
) -> str:
    """SHA-256 over the shards' hashes and the items.

    Args:
        shards: SHA-256 of each shard by its name.
        keys: of the items.
        groups: of the items.
        copies: of the items.
    """
    value = [sorted(shards.items()), keys, groups, copies]
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


class SourceHash:
    """SHA-256 over all that a dataset takes from its source: pictures, keys, classes, captions.

    Feed it every image in the order of the source. Files that are packed or dated otherwise give
    the same hash, if the images in them are the same.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: SourceImage) -> None:
        """Take the next image, undecoded."""
        data = image.pixels
        shape = None if isinstance(data, bytes) else list(data.shape)
        content = hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()
        about = [image.name, image.label, image.caption, image.group, image.family]
        self._digest.update(json.dumps([*about, shape, content]).encode())

    def hexdigest(self, class_names: Sequence[str] | None) -> str:
        """The hash, with the names of the classes."""
        digest = self._digest.copy()
        digest.update(json.dumps(list(class_names or ())).encode())
        return digest.hexdigest()


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and times of files: while it is the same, so is what they hold.

    A file that is written again has another time of change, whatever its owner says of its age.
    """
    value: list[list[str | int]] = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            value.append([os.fspath(file)])
            continue
        times = [found.st_mtime_ns, found.st_ctime_ns]
        value.append([os.fspath(file), found.st_size, found.st_ino, *times])
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
