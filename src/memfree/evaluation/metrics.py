"""Metrics and their table: values with intervals, written, read and printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memfree.console import shown
from memfree.evaluation.intervals import Interval, conditions_detail, rate_interval
from memfree.folders.atomic import write_json
from memfree.folders.untrusted import Maybe, Number, check_fields, read_json, short
from memfree.guidance.calibration import rate_text

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
    """A sample folder's name, or ``heldout``."""
    value: float
    """The number; rates are in [0, 1]."""
    low: float | None = None
    """Ends of the 95 % interval, None where there is none."""
    high: float | None = None
    count: int = 0
    """How many images it was measured on."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What else the number depends on: extractor, threshold, false-positive rate, reference."""


_SHAPE = {
    "metric": str,
    "subject": str,
    "value": Number(),
    "low": Maybe(Number()),
    "high": Maybe(Number()),
    "count": Number(),
    "detail": dict,
}


def metric(
    name: str, subject: str, interval: Interval | float, count: int, **detail: Any
) -> Metric:
    """A ``Metric`` from an interval or a bare number."""
    if not isinstance(interval, Interval):
        interval = Interval(float(interval))
    return Metric(name, subject, interval.value, interval.low, interval.high, count, detail)


def rate_metric(
    name: str, subject: str, flags: np.ndarray, clusters: np.ndarray | None = None, **detail: Any
) -> Metric:
    """The share of flags (n,) bool, with ``rate_interval`` over samples or over conditions."""
    detail |= conditions_detail(clusters)
    return metric(name, subject, rate_interval(flags, clusters), len(flags), **detail)


class MetricTable:
    """Metrics looked up by name and subject; the first of a pair wins."""

    def __init__(self, metrics: Iterable[Metric]):
        self.metrics = list(metrics)
        self._by_pair: dict[tuple[str, str], Metric] = {}
        for entry in self.metrics:
            self._by_pair.setdefault((entry.metric, entry.subject), entry)

    def get(self, name: str, subject: str) -> Metric | None:
        """The metric, None where it was not measured."""
        return self._by_pair.get((name, subject))

    def names(self) -> list[str]:
        """Names of the metrics, in the order of their first appearance."""
        return list(dict.fromkeys(entry.metric for entry in self.metrics))


def write_metrics(path: Path, metrics: Iterable[Metric]) -> None:
    """Write ``metrics.json`` atomically."""
    write_json(path, [asdict(entry) for entry in metrics])


def read_metrics(path: Path) -> MetricTable:
    """Read ``metrics.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a list of metrics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}; run `memfree evaluate` first")
    entries = read_json(path)
    try:
        return MetricTable([_metric(entry) for entry in entries])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a list of metrics: {short(error)}") from error


def _metric(entry: Any) -> Metric:
    found = Metric(**entry)
    check_fields(vars(found), _SHAPE, short(repr(found.metric), 40))
    # Other programs may write 1.0 as 1.
    low, high = (None if end is None else float(end) for end in (found.low, found.high))
    return replace(found, value=float(found.value), low=low, high=high)


COPIES_AT = "copies_at_"
"""Prefix of metrics of copies at another false-positive rate, before the rate."""
COPIES_OF_FACTOR = "copies_per_image_of_factor_"
"""Prefix of metrics of copies per training image, before the image's number of records."""


def percent(value: float) -> str:
    """A rate as a percentage: 0.4715 as 47.2 %, a tiny one with another digit."""
    digits = 2 if 0 < abs(100 * value) < 0.95 else 1
    return f"{100 * value:.{digits}f} %".replace("-", "−") if value else "0 %"


def number(value: float) -> str:
    """About three significant digits, without exponent: 0.0123, 1.23, 12.3, 1234."""
    size = abs(value)
    if value == 0 or size < 5e-5:
        return "0"
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if size >= limit), 4)
    return f"{value:.{digits}f}".replace("-", "−")


def times(value: float) -> str:
    """A ratio: 18.4 ×, 0.82 ×."""
    return f"{value:.{1 if value >= 1 else 2}f} ×" if value else "0 ×"


def seconds(value: float) -> str:
    """A duration: 12 ms, 1.3 s."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def memory(value: float) -> str:
    """Bytes as MB or GB."""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    metric: str
    label: str
    show: Callable[[float], str]
    section: str = "Memorization"
    """Heading that it stands under."""

    @property
    def note(self) -> str:
        """What the metric says."""
        return NOTES.get(self.metric, "At a laxer threshold.")

    def interval(self, found: Metric) -> str:
        """The 95 % interval in the row's unit, empty where there is none."""
        if found.low is None or found.high is None:
            return ""
        low = self.show(found.low).removesuffix(" %").removesuffix(" ×")
        return f"{low} – {self.show(found.high)}"


QUALITY, PAPERS, COST = "Quality", "Metrics that papers report", "Cost"
ROWS = (
    Row("copies", "Copies", percent),
    Row("second_copies", "Copies, second measure", percent),
    Row("duplicated_share", "Nearest image is a duplicated one", percent),
    Row("duplicated_share_ratio", "… over the expected share", times),
    Row("same_image", "Copies still nearest to the same image", percent),
    Row("same_image_chance", "… by chance", percent),
    Row("frechet_efficientnet", "Fréchet distance, EfficientNet", number, QUALITY),
    Row("frechet_pixels", "Fréchet distance, pixels", number, QUALITY),
    Row("frechet_inception", "Fréchet distance, Inception", number, QUALITY),
    Row("kid_efficientnet", "KID, EfficientNet", number, QUALITY),
    Row("kid_inception", "KID, Inception", number, QUALITY),
    Row("precision_efficientnet", "Precision, EfficientNet", percent, QUALITY),
    Row("recall_efficientnet", "Recall, EfficientNet", percent, QUALITY),
    Row("vendi_efficientnet", "Vendi score, EfficientNet", number, QUALITY),
    Row("diversity_efficientnet", "Diversity, EfficientNet", number, QUALITY),
    Row("clip_score", "CLIP score", number, QUALITY),
    Row("clip_margin", "… above shuffled captions", number, QUALITY),
    Row("class_agreement", "Shows the requested class", percent, QUALITY),
    Row("nl2_5th_percentile", "nL2, 5th percentile", number, PAPERS),
    Row("nl2_minimum", "nL2, minimum", number, PAPERS),
    Row("nl2_below_1.4", "nL2 below 1.4", percent, PAPERS),
    Row("nl2_below_1.6", "nL2 below 1.6", percent, PAPERS),
    Row("distance_ratio_below_third", "d₁/d₂ below 1/3", percent, PAPERS),
    Row("active_share", "Steps steered by AMG", percent, COST),
    Row("seconds_per_sample", "Time per sample", seconds, COST),
    Row("peak_memory_bytes", "Peak memory", memory, COST),
)
NOTES = {
    "copies": "Nearer to a training image than all but the stated share of real held-out images.",
    "second_copies": "By another similarity, calibrated separately, that no guidance saw.",
    "duplicated_share": "How often the nearest training image is a repeated one.",
    "duplicated_share_ratio": "Expected: the share of test images at the samples' class mix.",
    "same_image": "Of the noises that become a copy unguided; needs no threshold.",
    "same_image_chance": "The same for other noises of the class.",
    "frechet_efficientnet": "Distance from the test images' distribution; held out: of training "
    "images.",
    "frechet_pixels": "The same on pixels.",
    "frechet_inception": "FID as published.",
    "kid_efficientnet": "Kernel distance to the test images, unbiased in the number of images.",
    "kid_inception": "The same on Inception features.",
    "precision_efficientnet": "Share of the samples among real images (3 nearest neighbours, "
    "Kynkäänniemi et al.).",
    "recall_efficientnet": "Share of the test images among the samples.",
    "vendi_efficientnet": "Effective number of different images; held out: of test images.",
    "diversity_efficientnet": "Mean of 1 − cosine over pairs; held out: of test images.",
    "clip_score": "Mean cosine of image and caption; held out: of test images and their captions.",
    "clip_margin": "Minus the score of the same images with captions of other images.",
    "class_agreement": "By a classifier of the fit images; held out: its accuracy on test images.",
    "nl2_5th_percentile": "Normalized distance, eq. 8.",
    "nl2_minimum": "The nearest sample of all.",
    "nl2_below_1.4": "The paper's threshold for CIFAR-10; it does not carry over to other data.",
    "nl2_below_1.6": "Its second one.",
    "distance_ratio_below_third": "Three times nearer to the nearest than to the second nearest "
    "image (Gu et al.).",
    "active_share": "Over all steps and samples.",
    "seconds_per_sample": "With the search that fills the trace.",
    "peak_memory_bytes": "Of the process while it sampled.",
}
"""One sentence for a reader who has not met the metric."""


def shown_rows(table: MetricTable) -> list[Row]:
    """The rows that this evaluation has, other false-positive rates after the main one."""
    names = table.names()
    laxer = [
        Row(
            name,
            f"Copies at {100 * float(name.removeprefix(COPIES_AT)):g} % false positives",
            percent,
        )
        for name in names
        if name.startswith(COPIES_AT)
    ]
    rows = [ROWS[0], *laxer, *ROWS[1:]]
    return [row for row in rows if row.metric in names]


LABEL_WIDTH, SUBJECT_WIDTH = 34, 16
"""Columns of the terminal that the metrics' labels and one subject's numbers take, about."""


def print_table(table: MetricTable, subjects: Sequence[str], console: Console) -> None:
    """Print metrics by subject, intervals below the values.

    More subjects than the terminal is wide for are printed one table after another, held-out
    images in each.
    """
    sampled = [subject for subject in subjects if subject != HELDOUT]
    beside = [subject for subject in subjects if subject == HELDOUT]
    fit = max(1, (console.width - LABEL_WIDTH) // SUBJECT_WIDTH - len(beside))
    for start in range(0, len(sampled), fit):
        console.print(_table(table, [*sampled[start : start + fit], *beside]))


def _table(table: MetricTable, subjects: Sequence[str]) -> Table:
    main = table.get("copies", subjects[0])
    rate = "" if main is None else f" ({false_positives(main)} false positives)"
    printed = Table(title="Evaluation, with 95 % intervals", title_justify="left")
    printed.add_column("metric")
    for subject in subjects:
        title = "held out" if subject == HELDOUT else subject
        printed.add_column(Text(shown(title)), justify="right", no_wrap=True)
    rows = shown_rows(table)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        cells = []
        for subject in subjects:
            found = table.get(row.metric, subject)
            value, interval = (
                ("", "") if found is None else (row.show(found.value), row.interval(found))
            )
            cells.append(Text.assemble(value, (f"\n{interval}" if interval else "", "dim")))
        label = row.label + (rate if row.metric == "copies" else "")
        last = after is None or after.section != row.section
        printed.add_row(label, *cells, end_section=last)
    return printed


def false_positives(copies: Metric) -> str:
    """The threshold's false-positive rate, with its limits where the evaluation has them."""
    rate = copies.detail["false_positive_rate"]
    limits = copies.detail.get("false_positive_rate_limits")
    if isinstance(limits, list) and [type(end) for end in limits] == [float, float]:
        return rate_text(rate, limits)
    return f"{100 * rate:g} %"
