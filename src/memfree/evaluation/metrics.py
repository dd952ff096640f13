"""One measured number, and the list of them that ``metrics.json`` holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from memfree.evaluation.intervals import Interval
from memfree.folders.atomic_files import write_json
from memfree.untrusted import read_json, short

HELDOUT = "heldout"
"""Subject of what is measured on the test images, as if they were samples."""
CHANGED = "changed"
"""Subject of training images changed on purpose: known copies, to see what a measure finds."""


@dataclass(frozen=True)
class Metric:
    """One number of one subject, as it stands in ``metrics.json``."""

    metric: str
    """Its name, for example ``copies`` or ``frechet_efficientnet``."""
    subject: str
    """Whose it is: a sample folder's name, or ``heldout``."""
    value: float
    """The number; rates are in [0, 1]."""
    low: float | None = None
    """Lower end of the 95 % interval, None where there is none."""
    high: float | None = None
    """Upper end of it."""
    count: int = 0
    """How many images it was measured on."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What else the number depends on: extractor, threshold, false-positive rate, reference."""


def metric(
    name: str, subject: str, interval: Interval | float, count: int, **detail: Any
) -> Metric:
    """A ``Metric`` from an interval or a bare number."""
    if not isinstance(interval, Interval):
        interval = Interval(float(interval))
    return Metric(name, subject, interval.value, interval.low, interval.high, count, detail)


class MetricTable:
    """Metrics looked up by name and subject; the first of a pair wins."""

    def __init__(self, metrics: Iterable[Metric]):
        self.metrics = list(metrics)
        self._by_pair: dict[tuple[str, str], Metric] = {}
        for one in self.metrics:
            self._by_pair.setdefault((one.metric, one.subject), one)

    def get(self, name: str, subject: str) -> Metric | None:
        """The metric, None where it was not measured."""
        return self._by_pair.get((name, subject))

    def names(self) -> list[str]:
        """Names of the metrics, in the order of their first appearance."""
        return list(dict.fromkeys(one.metric for one in self.metrics))


def write_metrics(path: Path, metrics: Iterable[Metric]) -> None:
    """Write ``metrics.json`` atomically."""
    write_json(path, [asdict(one) for one in metrics])


def read_metrics(path: Path) -> MetricTable:
    """Read ``metrics.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a list of metrics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}; run `memfree evaluate` first")
    try:
        return MetricTable([_metric(entry) for entry in read_json(path)])
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a list of metrics: {short(error)}") from error


def _metric(entry: Any) -> Metric:
    """One entry of ``metrics.json``; TypeError if it is something else."""
    one = Metric(**entry)
    for kind, values in (
        (str, (one.metric, one.subject)),
        ((int, float), (one.value, one.count)),
        ((int, float, NoneType), (one.low, one.high)),
        (dict, (one.detail,)),
    ):
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{short(repr(value), 40)} in {short(repr(one.metric), 40)}")
    # JSON of others may write 1.0 as 1.
    low, high = (None if end is None else float(end) for end in (one.low, one.high))
    return replace(one, value=float(one.value), low=low, high=high)
