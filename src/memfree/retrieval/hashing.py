"""An index for parties who may not hold the images: embeddings, and keys hashed with a salt."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from memfree.folders.atomic_files import write_atomic
from memfree.retrieval.items import Items, conditions_table
from memfree.untrusted import check_plain

if TYPE_CHECKING:
    from memfree.retrieval.index import ReferenceIndex

_SHORTEST = 16
"""Characters of a salt: with fewer, keys can be found out by trying salts."""

_LONGEST = 1 << 16
"""Bytes of a salt's file."""


def hashed_key(key: str, salt: str) -> str:
    """HMAC-SHA256 of an image key under the owner's salt, as hexadecimal digits.

    Whoever has the salt and the list of keys finds the key of a hit; nobody else can tell whether a
    given key is in the index.
    """
    return hmac.new(salt.encode(), key.encode(), hashlib.sha256).hexdigest()


def read_salt(path: Path) -> str:
    """The salt in a file; a random one is written there, for its owner's eyes, if there is none."""
    if not os.path.lexists(path):

        def write(temporary: Path) -> None:
            temporary.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")

        write_atomic(path, write, mode=0o600)
    check_plain(path)
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path} holds no salt: it has more than {_LONGEST} bytes")
    return path.read_text(encoding="utf-8").strip()


def hashed(
    index: ReferenceIndex, salt: str, keep_captions: bool = False, keep_shards: bool = False
) -> ReferenceIndex:
    """The index without what names its images; see ``ReferenceIndex.hashed``."""
    from memfree.retrieval.index import ReferenceIndex

    if len(salt) < _SHORTEST:
        raise ValueError(f"the salt has {len(salt)} characters; use {_SHORTEST} or more")
    if index.features.reveals_images:
        raise ValueError(
            f"an index of {index.features.describe()['name']} features shows its images whatever "
            "its keys are; index them by another extractor, as SSCD"
        )
    items = index.items
    keys = [hashed_key(key, salt) for key in items.keys]
    totals: dict[tuple[int, int | None, str | None], int] = {}
    for condition in items.conditions.to_pylist():
        caption = condition["caption"] if keep_captions else None
        if condition["label"] is not None or caption is not None:
            kept = (condition["row"], condition["label"], caption)
            totals[kept] = totals.get(kept, 0) + condition["count"]
    # The content hashes go as well: anybody could compute them from an image.
    hidden = Items(
        keys,
        items.group.cpu(),
        items.multiplicity.cpu(),
        conditions_table(totals, keys),
        index.num_classes,
        list(items.shards) if keep_shards else None,
    )
    return ReferenceIndex(
        index.vectors,
        index.features,
        hidden,
        index.image_shape,
        index.dataset_hash,
        dict(index.calibrations),
    ).to(index.device)
