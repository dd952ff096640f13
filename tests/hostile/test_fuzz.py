"""Valid folders with bytes and JSON values changed at random: read, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
from hostile_guard import bounded, one_line
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from spoiling import places
from test_hostile_folders import READERS as FOLDERS

from memfree.data.shard_reader import read_shard
from memfree.data.skipped import Skipped
from memfree.evaluation.metrics import read_metrics
from memfree.training.checkpoints import good_checkpoint, read_identity


def read_checkpoint(folder):
    path = good_checkpoint(folder)
    assert path is not None and isinstance(read_identity(path), dict)


READERS = {**FOLDERS, "checkpoints": read_checkpoint}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([1 << 62, -(1 << 62), 1 << 80, 1e308, "../x", "/etc/passwd", "\0", "\x1b["]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=4,
)
FILES = {
    "data": ["manifest.json", "items.parquet", "records.parquet", "conditions.parquet"]
    + ["train-000000.tar"],
    "index": ["manifest.json", "vectors.npy", "items.parquet", "conditions.parquet"]
    + ["calibration.json"],
    "samples": ["manifest.json", "samples-000-000000.tar", "trace-000-000000.parquet"],
    "evaluation": ["manifest.json", "metrics.json", "per_sample.parquet", "pictures.parquet"],
    "checkpoints": ["step-00000002.ckpt"],
}
FEW = settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=5000, derandomize=False, phases=list(Phase))


@pytest.fixture(scope="module")
def spoilt(whole, tmp_path_factory):
    """Copies of the whole folders, whose files are put back after every example."""
    root = tmp_path_factory.mktemp("fuzz")
    for kind in FILES:
        shutil.copytree(whole / kind, root / kind)
    return root


def changed(data, changes):
    """Bytes after some changes."""
    for kind, where, new in changes:
        at = min(int(where * len(data)), max(len(data) - 1, 0))
        if kind == "flip":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at] + data[at : at + 600] + data[at:]
    return data


def replaced(value, where, new, how):
    """A JSON value with one of its parts replaced, removed, or added to."""
    value = json.loads(json.dumps(value))
    spots = list(places(value)) or [[]]
    *keys, last = spots[min(int(where * len(spots)), len(spots) - 1)] or [None]
    inner = value
    for key in keys:
        inner = inner[key]
    if last is None:
        return new
    if how == "remove":
        del inner[last]
    elif how == "rename" and isinstance(inner, dict):
        inner[str(new)] = inner.pop(last)
    else:
        inner[last] = new
    return value


def read(reader, *arguments):
    """Let a reader read or refuse."""
    try:
        with bounded():
            reader(*arguments)
    except (ValueError, OSError) as error:
        one_line(error)


def fuzz_bytes(folder, kind, name, changes):
    path = folder / kind / name
    whole = path.read_bytes()
    try:
        path.write_bytes(changed(whole, changes))
        if path.suffix == ".parquet":
            _agree(folder / kind, name)
        read(READERS[kind], folder / kind)
    finally:
        path.write_bytes(whole)
        if path.suffix == ".parquet":
            _agree(folder / kind, name)


def _agree(folder, name):
    """Let an index's manifest have the hash of a changed table, as a forger would."""
    from spoiling import _declare

    if folder.name == "index":
        _declare(folder, name)


def fuzz_json(folder, kind, name, where, new, how):
    path = folder / kind / name
    whole = path.read_text()
    try:
        value = replaced(json.loads(whole), where, new, how)
        path.write_text(json.dumps(value), "utf-8", "surrogatepass")
        read(READERS[kind], folder / kind)
        if name == "metrics.json":
            read(read_metrics, path)
    finally:
        path.write_text(whole)


def fuzz_tar(folder, changes):
    path = Path(folder) / "fuzz.tar"
    path.write_bytes(changed((folder / "data" / "train-000000.tar").read_bytes()[:9000], changes))
    skipped = Skipped()
    with bounded():
        for record in read_shard(str(path), skipped):
            assert record.name.isprintable()
    assert all(message.isprintable() for message in skipped.messages)
    read(lambda: list(read_shard(str(path))))


TABLES = [(kind, name) for kind, names in FILES.items() for name in names]
JSONS = [(kind, name) for kind, name in TABLES if name.endswith(".json")]
HOW = st.sampled_from(["replace", "remove", "rename"])


@pytest.mark.parametrize(("kind", "name"), TABLES)
def test_changed_bytes(spoilt, kind, name):
    FEW(given(CHANGES)(lambda changes: fuzz_bytes(spoilt, kind, name, changes)))()


@pytest.mark.parametrize(("kind", "name"), JSONS)
def test_changed_values(spoilt, kind, name):
    FEW(
        given(st.floats(0, 1), JSON, HOW)(
            lambda where, new, how: fuzz_json(spoilt, kind, name, where, new, how)
        )
    )()


def test_changed_tars(spoilt):
    FEW(given(CHANGES)(lambda changes: fuzz_tar(spoilt, changes)))()


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "name"), TABLES)
def test_many_changed_bytes(spoilt, kind, name):
    MANY(given(CHANGES)(lambda changes: fuzz_bytes(spoilt, kind, name, changes)))()


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "name"), JSONS)
def test_many_changed_values(spoilt, kind, name):
    MANY(
        given(st.floats(0, 1), JSON, HOW)(
            lambda where, new, how: fuzz_json(spoilt, kind, name, where, new, how)
        )
    )()


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_many_changed_tars(spoilt):
    MANY(given(CHANGES)(lambda changes: fuzz_tar(spoilt, changes)))()
