"""The summary of a trace, counted by hand."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from memfree.sampling.summary import trace_summary

CONDITIONS = {0: 1, 1: 2, 2: 1}
LABELS = {"a": 1, "b": 2}


def write(path, rows):
    names = ("sample", "sigma", "lambda", "active", "nearest")
    parquet.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    return path


@pytest.fixture
def traces(tmp_path):
    first = [
        (0, -0.9, -0.5, True, "a"),
        (0, -2.0, -0.5, False, "a"),
        (1, -0.9, -0.5, True, "a"),  # another label than 2
        (1, -0.5, -0.5, True, "b"),
    ]
    second = [(2, -1.00005, -0.5, False, "b"), (2, -1.2, -0.5, False, None)]
    return [write(tmp_path / "1.parquet", first), write(tmp_path / "2.parquet", second)]


def test_counts(traces):
    assert trace_summary(traces, {"a": 0.5, "b": 0.5}, CONDITIONS, LABELS) == {
        "active_samples": pytest.approx(2 / 3),
        "active_steps": 0.5,
        "undecided_samples": 1,  # sample 2: σ − (λ − 0.5) = −0.00005
        "other_label_steps": pytest.approx(1 / 3),
    }
    assert trace_summary(traces, {}, CONDITIONS, None) == {
        "active_samples": pytest.approx(2 / 3),
        "active_steps": 0.5,
        "undecided_samples": 1,  # sample 1: σ = λ
        "other_label_steps": None,
    }


def test_nothing_observed(tmp_path):
    rows = [(0, None, None, False, None), (1, 1.0, 0.0, False, "a")]
    summary = trace_summary([write(tmp_path / "1.parquet", rows)], {}, {0: None, 1: None}, LABELS)
    assert summary["undecided_samples"] == 0
    assert summary["other_label_steps"] is None
