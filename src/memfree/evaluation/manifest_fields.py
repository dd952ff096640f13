"""What the manifests of an evaluation's inputs must say, so that a report can be made of them."""

from __future__ import annotations

from types import NoneType
from typing import Any

from memfree.untrusted import Maybe, Number

_SIDE = Number(1, 1 << 20, whole=True)
_COUNT = Number(0, 1 << 53, whole=True)
_MADE_BY = {
    "command": [str],
    "packages": {str: (str, NoneType)},
    "python": str,
    "device": str,
    "created": str,
    "seed": (int, NoneType),
    "git_commit": Maybe(str),
}
_COMMAND = {"command": [str]}
DATASET: dict[Any, Any] = {
    "made_by": _COMMAND,
    "image_shape": [_SIDE],
    "source": Maybe({"name": Maybe(str), "licence": Maybe(str)}),
    "parts": Maybe({str: {"images": Maybe(_COUNT), "records": Maybe(_COUNT)}}),
    "plan": Maybe({"ladder": Maybe([Number()]), "factor": Maybe(Number()), "kinds": Maybe([str])}),
    "repeated_images": Maybe(_COUNT),
}
"""Of a dataset folder."""
INDEX: dict[Any, Any] = {
    "made_by": _COMMAND,
    "rows": Maybe(_COUNT),
    "metric": Maybe(str),
    "features": Maybe({"name": Maybe(str)}),
}
"""Of a reference index."""
SAMPLES: dict[Any, Any] = {
    "made_by": {**_COMMAND, "device": Maybe(str)},
    "count": _COUNT,
    "mitigation": Maybe(str),
    "index_features": Maybe(str),
    "model": Maybe(str),
    "dataset_hash": Maybe(str),
    "seconds_per_sample": Maybe(Number(0)),
    "peak_memory_bytes": Maybe(Number(0)),
}
"""Of a sample folder."""
MODEL: dict[Any, Any] = {
    "made_by": _COMMAND,
    "parameters": Maybe(Number(0)),
    "exposures": Maybe({"largest": Maybe(Number(0))}),
}
"""Of the model that drew samples."""
EVALUATION: dict[Any, Any] = {
    "made_by": _MADE_BY,
    "reference": str,
    "paired": {str: str},
    "false_positive_rate": Number(0, 1),
    "dataset": {"manifest": DATASET, "hash": str},
    "index": {"manifest": INDEX},
    "samples": {str: {"manifest": SAMPLES, "model": Maybe(MODEL)}},
}
"""Of an evaluation, with those of what it was made from."""
