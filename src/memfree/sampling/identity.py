"""Contents that samples depend on, as hashes: another model or index is another run."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from memfree.guidance import default_similarity

if TYPE_CHECKING:
    from memfree.retrieval import ReferenceIndex


def index_state(index: ReferenceIndex | None) -> dict[str, str | None]:
    """What samples depend on in an index: its rows and their counts, the calibration in use."""
    if index is None:
        return {"index_sha256": None, "calibration_sha256": None}
    calibration = json.dumps(index.calibrations[default_similarity(index).name], sort_keys=True)
    return {
        "index_sha256": vectors_hash(index),
        "calibration_sha256": hashlib.sha256(calibration.encode()).hexdigest(),
    }


def vectors_hash(index: ReferenceIndex) -> str:
    """SHA-256 over the rows of an index, their extractor, and all that is known of them."""
    digest = hashlib.sha256(index.vectors.detach().cpu().contiguous().numpy().tobytes())
    for column in (index.group, index.multiplicity):
        digest.update(column.cpu().numpy().tobytes())
    known = {"features": index.features.describe(), "num_classes": index.num_classes}
    digest.update(json.dumps(known, sort_keys=True).encode())
    # Line by line: an index may have millions of rows, each with several captions.
    for key in index.keys:
        digest.update(json.dumps(key).encode() + b"\n")
    for batch in index.items.conditions.to_batches(max_chunksize=4096):
        digest.update("".join(f"{json.dumps(row)}\n" for row in batch.to_pylist()).encode())
    return digest.hexdigest()
