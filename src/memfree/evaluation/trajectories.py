"""σ_t against λ_t: how near samples are to training images while they are being drawn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from memfree.sampling.folder import SampleFolder

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of σ_t over the samples of a group, at every step."""


def trajectory_rows(
    subject: str, trace: pa.Table, groups: dict[str, np.ndarray]
) -> list[dict[str, object]]:
    """Quantiles of σ_t per step for groups of samples.

    Args:
        subject: name in the rows.
        trace: of a sample folder: ``sample``, ``step``, ``t``, ``sigma``, ``lambda``, ``active``.
        groups: group name to the sample numbers in it; empty groups are left out.

    Returns:
        One row a group and step: subject, group, samples, step, t, lambda, active (share) and
        the quantiles q10, q25, q50, q75, q90.
    """
    columns = {
        name: _column(trace, name) for name in ("sample", "step", "t", "sigma", "lambda", "active")
    }
    rows: list[dict[str, object]] = []
    for group, members in groups.items():
        chosen = np.isin(columns["sample"], members)
        for step in np.unique(columns["step"][chosen]):
            here = chosen & (columns["step"] == step)
            sigma = columns["sigma"][here]
            sigma = sigma[np.isfinite(sigma)]
            if len(sigma) == 0:
                continue
            quantiles = np.quantile(sigma, QUANTILES)
            rows.append(
                {
                    "subject": subject,
                    "group": group,
                    "samples": len(members),
                    "step": int(step),
                    "t": float(columns["t"][here][0]),
                    "lambda": _finite_or_none(columns["lambda"][here][0]),
                    "active": float(columns["active"][here].mean()),
                    **{
                        f"q{round(100 * q)}": float(value)
                        for q, value in zip(QUANTILES, quantiles, strict=True)
                    },
                }
            )
    return rows


def trace_of(folder: SampleFolder) -> pa.Table | None:
    """The folder's trace, None for samples that were drawn without an index."""
    return folder.trace() if any(folder.path.glob("trace-*.parquet")) else None


def active_share(trace: pa.Table) -> float:
    """Share of all steps of all samples at which a guidance was active."""
    return float(_column(trace, "active").mean())


def _column(trace: pa.Table, name: str) -> np.ndarray:
    """A column as float64; null and absent are NaN, except that absent activity is none."""
    if name not in trace.column_names:
        return np.full(trace.num_rows, 0.0 if name == "active" else np.nan)
    values = trace[name].cast(pa.float64()) if name != "active" else trace[name].cast(pa.int8())
    return values.to_numpy().astype(np.float64)


def _finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
