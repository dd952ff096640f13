"""What `memfree index` prints of an index: its size and its thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from memfree.calibration_size import DEFAULT_RATE, MIN_EXPECTED

if TYPE_CHECKING:
    from memfree.guidance.calibration import Calibration
    from memfree.retrieval import ReferenceIndex


def summary(index: ReferenceIndex) -> Table:
    """Rows, groups, records and duplicated groups of an index, to print."""
    import torch

    totals = torch.zeros(int(index.group.max()) + 1, dtype=torch.int64)
    totals[index.group.cpu()] = index.group_multiplicity.cpu()
    repeated = int((totals > 1).sum())
    table = Table(title="Reference index", title_justify="left")
    for column in ("distinct images", "groups", "training records", "duplicated groups"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{len(index):,}",
        f"{len(totals):,}",
        f"{int(totals.sum()):,}",
        f"{repeated:,}" + (f" (up to {int(totals.max()):,} records)" if repeated else ""),
    )
    return table


def thresholds(calibration: Calibration) -> Table:
    """Thresholds with intervals at 5 %, 1 % and the smallest rate that n images allow."""
    n = len(calibration.sigmas)
    smallest = MIN_EXPECTED / n
    distance = calibration.similarity.startswith("nl2")
    table = Table(
        title=f"An image is called a copy if σ ({calibration.similarity}) is above",
        caption=f"from {n:,} held-out images" + ("; nL2 is −σ" if distance else ""),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("false positives", "threshold on σ", "95 % interval"):
        table.add_column(column, justify="right")
    for rate in sorted({0.05, DEFAULT_RATE, smallest}, reverse=True):
        if smallest <= rate < 1:
            low, high = calibration.threshold_interval(rate)
            threshold = calibration.threshold(rate)
            table.add_row(f"{100 * rate:.3g} %", f"{threshold:.3f}", f"{low:.3f} … {high:.3f}")
    return table
