"""The summary of a trace, counted by hand."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from memfree.sampling.sample_run import trace_summary

CONDITIONS = {0: 1, 1: 2, 2: 1}
LABELS = {"a": 1, "b": 2}


def write(path, rows):
    names = ("sample", "sigma", "lambda", "active", "nearest", "gate")[: len(rows[0])]
    parquet.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    return path


FIRST = [
    (0, -0.9, -0.5, True, "a"),
    (0, -2.0, -0.5, False, "a"),
    (1, -0.9, -0.5, True, "a"),  # another label than 2
    (1, -0.5, -0.5, True, "b"),
]
SECOND = [(2, -1.00005, -0.5, False, "b"), (2, -1.2, -0.5, False, None)]


@pytest.fixture
def traces(tmp_path):
    return [write(tmp_path / "1.parquet", FIRST), write(tmp_path / "2.parquet", SECOND)]


def test_counts(traces, tmp_path):
    gates = [(*row, -0.95 if row[0] == 0 else -1.0) for row in [*FIRST, *SECOND]]
    assert trace_summary([write(tmp_path / "3.parquet", gates)], CONDITIONS, LABELS) == {
        "active_samples": pytest.approx(2 / 3),
        "active_steps": 0.5,
        "undecided_samples": 1,  # sample 2: σ − gate = −0.00005
        "other_label_steps": pytest.approx(1 / 3),
    }
    assert trace_summary(traces, CONDITIONS, None) == {
        "active_samples": pytest.approx(2 / 3),
        "active_steps": 0.5,
        "undecided_samples": 1,  # sample 1: σ = λ
        "other_label_steps": None,
    }


def test_nothing_observed(tmp_path):
    rows = [(0, None, None, False, None), (1, 1.0, 0.0, False, "a")]
    summary = trace_summary([write(tmp_path / "1.parquet", rows)], {0: None, 1: None}, LABELS)
    assert summary["undecided_samples"] == 0
    assert summary["other_label_steps"] is None
