"""Sources, declared duplication, dataset folders and the streams that training reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfree.data.folder import DatasetFolder, DatasetPart
from memfree.data.foreign import StreamOptions
from memfree.data.plan import DuplicationPlan
from memfree.data.prepare import prepare
from memfree.data.split import PartSizes

if TYPE_CHECKING:
    from memfree.data.datamodule import ShardDataModule
    from memfree.data.exposures import ExposureCounter

__all__ = [
    "DatasetFolder",
    "DatasetPart",
    "DuplicationPlan",
    "ExposureCounter",
    "PartSizes",
    "ShardDataModule",
    "StreamOptions",
    "prepare",
]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning only when it is asked for: that takes seconds."""
    if name == "ShardDataModule":
        from memfree.data.datamodule import ShardDataModule

        return ShardDataModule
    if name == "ExposureCounter":
        from memfree.data.exposures import ExposureCounter

        return ExposureCounter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
