"""What the trace of a whole run comes to: how much was steered, and how often narrowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from memfree.untrusted import read_table

GATE_TOLERANCE = 1e-4
"""A σ this near the gate may fall on either side of it for another batch size."""


def trace_summary(
    traces: Sequence[Path],
    conditions: Mapping[int, int | str | None],
    labels: Mapping[str, int | str] | None,
) -> dict[str, float | int | None]:
    """Counts over all traces of a run.

    Args:
        traces: files with the columns of DESIGN.md; read one at a time.
        conditions: label or prompt of every sample, None without.
        labels: label, or caption, of the image with that key in the index; None without.

    Returns:
        ``active_samples`` and ``active_steps``: shares, in [0, 1], of samples steered at some step
        and of sample-steps steered; ``undecided_samples``: number of samples with
        |σ_t − gate| < 1e-4 at some step, whose bits may depend on the batch size (λ_t itself is
        the gate where a guidance recorded no ``gate``);
        ``other_label_steps``: share of the steered sample-steps whose nearest image has another
        label (or caption) than the sample (or its prompt), so that eq. 16 may cost a denoiser call;
        None where nothing was steered or there are no labels.
    """
    rows = active_rows = other = 0
    samples: set[int] = set()
    active: set[int] = set()
    undecided: set[int] = set()
    for path in traces:
        table = read_table(path)
        sample = table["sample"].to_numpy()
        sigma = table["sigma"].to_numpy(zero_copy_only=False)
        gate = table["gate" if "gate" in table.column_names else "lambda"].to_numpy()
        is_active = table["active"].to_numpy(zero_copy_only=False).astype(bool)
        near = np.abs(sigma - gate) < GATE_TOLERANCE
        rows += len(sample)
        active_rows += int(is_active.sum())
        samples.update(sample.tolist())
        active.update(sample[is_active].tolist())
        undecided.update(sample[near].tolist())
        if labels is not None:
            nearest = table["nearest"].filter(is_active).to_pylist()
            other += sum(
                labels.get(key) != conditions[i]
                for key, i in zip(nearest, sample[is_active].tolist(), strict=True)
            )
    known = labels is not None and all(conditions[i] is not None for i in samples)
    return {
        "active_samples": len(active) / max(len(samples), 1),
        "active_steps": active_rows / max(rows, 1),
        "undecided_samples": len(undecided),
        "other_label_steps": other / active_rows if known and active_rows else None,
    }
