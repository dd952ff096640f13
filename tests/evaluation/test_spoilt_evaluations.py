"""Manifests, metrics and tables that were spoilt: a page, or one line that names the folder.

Values of the JSON files that `memfree report` and `memfree evaluate` read are removed and replaced
by others, chosen by a seed.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from memfree.cli.errors import message_of
from memfree.commands.report import report
from memfree.evaluation.folder import EvaluationFolder
from memfree.evaluation.inputs import open_inputs
from memfree.evaluation.page import report_page
from memfree.evaluation.writer import _model_manifest, cost_metrics

REMOVED = object()
VALUES = {
    "removed": REMOVED,
    "null": None,
    "true": True,
    "text": "x",
    "empty": "",
    "list": [],
    "lists": [[1]],
    "object": {},
    "objects": {"a": {"b": 1}},
    "negative": -1,
    "fraction": -1.5,
    "beyond 64 bits": 1 << 70,
    "huge": 1e308,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "beyond float64": 10**400,
    "unicode": "\u202e\U0001f600 \x1b[2J\0<b>",
    "no unicode": "\ud800",
    "long": "word " * 2000,
}


def places(value, *before):
    """Every place in a JSON value, as keys; of long lists the first and last."""
    if before:
        yield before
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, *before, key)
    elif isinstance(value, list):
        for key in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[key], *before, key)


def spoilt(whole, keys, new):
    """The JSON text of a value whose part at ``keys`` is removed or replaced."""
    value = json.loads(json.dumps(whole))
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = new
    return json.dumps(value)


def one_line(error, folder):
    message = message_of(error)
    assert len(message) < 900 and str(folder) in message, message
    assert "\n" not in message and "\x1b" not in message, repr(message)


def every(path, read, folder, some=None):
    """Spoil each place of a JSON file with each value, and read; a share of them by ``some``."""
    whole = json.loads(path.read_text())
    refused = 0
    cases = [(keys, name) for keys in places(whole) for name in VALUES]
    if some is not None:
        chosen = np.random.default_rng(0).permutation(len(cases))[:some]
        cases = [cases[number] for number in chosen]
    for keys, name in cases:
        path.write_text(spoilt(whole, keys, VALUES[name]))
        try:
            read()
        except (ValueError, OSError) as error:
            one_line(error, folder)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{path.name} {keys} {name}: {error!r}") from error
    path.write_text(json.dumps(whole))
    return refused, len(cases)


@pytest.fixture
def copy(evaluation, tmp_path):
    return shutil.copytree(evaluation, tmp_path / "evaluation")


def text_of(folder):
    """What `memfree report` makes, without its drawings."""
    found = EvaluationFolder(folder)
    found.check_figures()
    found.distances()
    report_page(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
def test_values_of_an_evaluation(copy, monkeypatch, name):
    charts = dict.fromkeys(["trajectory", "dose", "distance"], "")
    monkeypatch.setattr("memfree.evaluation.page._charts", lambda folder: charts)
    if name == "metrics.json":  # one metric of each kind: all are read alike
        metrics = json.loads((copy / name).read_text())
        kept = [one for one in metrics if one["metric"] == "copies"]
        kept += [one for one in metrics if one["subject"] == "unguided"][::4]
        second = [one for one in metrics if one["metric"] in ("second_copies", "copies_at_0.05")]
        factors = [one for one in metrics if one["metric"].startswith("copies_per_image")]
        (copy / name).write_text(json.dumps([*kept[:3], second[0], factors[0], kept[4]]))
        assert text_of(copy) is None
    refused, count = every(copy / name, lambda: text_of(copy), copy, some=700)
    assert 0 < refused < count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
def test_some_values_of_an_evaluation_to_its_page(copy, tmp_path, name):
    every(copy / name, lambda: report(copy, tmp_path / "out"), copy, some=25)


COLUMNS = {
    "pictures.parquet": ["column", "subject", "sample", "key", "multiplicity", "sigma", "copy"]
    + ["png"],
    "trajectories.parquet": ["subject", "group", "t", "lambda", "q10", "q50"],
    "per_sample.parquet": ["subject", "sigma"],
}
OTHER = {
    "removed": None,
    "null": pa.scalar(None, pa.null()),
    "text": pa.scalar("x"),
    "bytes": pa.scalar(b"x"),
    "whole number": pa.scalar(-7, pa.int64()),
    "not a number": pa.scalar(float("nan")),
    "infinity": pa.scalar(float("inf")),
    "huge": pa.scalar(1e308),
    "list": pa.scalar([1]),
    "true": pa.scalar(True),
    "no rows": "no rows",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_of_an_evaluation(copy, tmp_path, name):
    whole = parquet.read_table(copy / name)
    for column in COLUMNS[name]:
        for what, new in OTHER.items():
            place = whole.column_names.index(column)
            if what == "removed":
                table = whole.drop_columns([column])
            elif what == "no rows":
                table = whole.slice(0, 0)
            else:
                filled = pa.array([new.as_py()] * len(whole), new.type)
                table = whole.set_column(place, column, filled)
            parquet.write_table(table, copy / name)
            try:
                # Most are refused before anything is drawn; these may not be.
                if what in ("huge", "no rows", "whole number"):
                    report(copy, tmp_path / "out")
                else:
                    found = EvaluationFolder(copy)
                    found.check_figures()
                    found.distances()
            except ValueError as error:
                one_line(error, copy)
                assert name in str(error) or "drawn" in str(error)
            except Exception as error:
                raise AssertionError(f"{name} {column} {what}: {error!r}") from error
    parquet.write_table(whole, copy / name)


@pytest.fixture
def inputs(dataset, index, samples, tmp_path):
    return {
        "dataset": shutil.copytree(dataset, tmp_path / "dataset"),
        "index": shutil.copytree(index, tmp_path / "index"),
        "samples": shutil.copytree(samples["amg"], tmp_path / "samples"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dataset", "index", "samples"])
def test_values_of_what_is_evaluated(inputs, tmp_path, kind):
    def read():
        found = open_inputs(
            inputs["dataset"], inputs["index"], {"a": inputs["samples"]}, "unguided", ()
        )
        cost_metrics(found)
        _model_manifest(found.samples["a"].manifest.get("model"))

    refused, count = every(inputs[kind] / "manifest.json", read, tmp_path, some=300)
    assert 0 < refused < count
