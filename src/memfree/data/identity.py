"""The identity of a dataset."""

from __future__ import annotations

import hashlib
import json


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
