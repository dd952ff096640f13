"""metrics.json as it is read again."""

import json

from memfree.evaluation.metrics import Metric, read_metrics, write_metrics


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "metrics.json"
    written = [
        Metric("copies", "amg", 0.25, 0.1, 0.4, 40, {"threshold": 0.5}),
        Metric("frechet", "amg", 3.0),
    ]
    write_metrics(path, written)
    assert read_metrics(path).metrics == written


def test_whole_numbers_of_others_are_read_as_numbers(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps([{"metric": "copies", "subject": "amg", "value": 1, "low": 0}]))
    (one,) = read_metrics(path).metrics
    assert [type(value) for value in (one.value, one.low, one.high)] == [float, float, type(None)]
