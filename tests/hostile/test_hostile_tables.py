"""Parquet files of few bytes that would unpack to many, whatever the type of their columns."""

import os

import numpy as np
import pyarrow as pa
import pytest
from hostile_guard import refused
from pyarrow import parquet

from memfree.folders.untrusted import read_table

ROWS, LENGTH = 1 << 13, 1 << 20


def repeated(value, kind, rows=ROWS):
    """``rows`` times one value, without holding them."""
    return pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(rows, np.int32)), pa.array([value], kind)
    )


def lists(kind, length):
    """A list column of few rows with many equal values in it."""
    values = pa.array(np.zeros(length, np.int8)).cast(kind)
    return pa.ListArray.from_arrays([0, length], values)


BOMBS = {
    "bytes": lambda: repeated(b"x" * LENGTH, pa.binary()),
    "large bytes": lambda: repeated(b"x" * LENGTH, pa.large_binary()),
    "texts": lambda: repeated("x" * LENGTH, pa.string()),
    "large texts": lambda: repeated("x" * LENGTH, pa.large_string()),
    "lists": lambda: lists(pa.int64(), 1 << 24),
    "structures": lambda: pa.StructArray.from_arrays([lists(pa.int64(), 1 << 24)], ["a"]),
    "maps": lambda: pa.MapArray.from_arrays(
        [0, 1 << 20], pa.array(["a"] * (1 << 20)), pa.array(np.zeros(1 << 20, np.int64))
    ),
    "vectors": lambda: pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(1 << 24, np.int64)), 1 << 20
    ),
    "wide bytes": lambda: pa.array([b"x" * LENGTH] * 256, pa.binary(LENGTH)),
}


def write(path, column, **options):
    plain = column.type.value_type if pa.types.is_dictionary(column.type) else None
    table = pa.table({"a": column})
    # As a forger would: the file says that the column is a plain one.
    options = {"compression": "zstd", "store_schema": plain is None, **options}
    parquet.write_table(table, path, **options)


@pytest.mark.parametrize("name", BOMBS)
def test_columns_that_are_bombs(tmp_path, name):
    path = tmp_path / "a.parquet"
    write(path, BOMBS[name]())
    assert path.stat().st_size < 1 << 18
    refused(lambda: read_table(path), path)


def test_columns_that_stay_dictionaries(tmp_path):
    """The type of the column is a dictionary, as pandas writes its categories."""
    path = tmp_path / "a.parquet"
    write(path, BOMBS["texts"](), store_schema=True)
    assert pa.types.is_dictionary(parquet.read_schema(path)[0].type)
    refused(lambda: read_table(path), path)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_encodings_of_long_texts(tmp_path, encoding):
    path = tmp_path / "a.parquet"
    table = pa.table({"a": pa.array(["x" * LENGTH] * 200)})
    parquet.write_table(
        table, path, use_dictionary=False, column_encoding={"a": encoding}, compression="zstd"
    )
    refused(lambda: read_table(path), path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None], pa.int32()),
        pa.array([1.5, 2.5], pa.float16()),
        pa.array([True, False]),
        pa.array(["a", None]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array([b"a", b"\xff"]),
        pa.array([None, None]),
        pa.array(["a", "a"]).dictionary_encode(),
        pa.array([0, 1], pa.timestamp("us")),
    ],
    ids=lambda column: str(column.type),
)
def test_ordinary_columns_are_read(tmp_path, column):
    path = tmp_path / "a.parquet"
    table = pa.table({"a": column})
    parquet.write_table(table, path)
    assert read_table(path).equals(parquet.read_table(path))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.parquet")
    (tmp_path / "zero.parquet").symlink_to("/dev/zero")
    (tmp_path / "circle.parquet").symlink_to("circle.parquet")
    for path in tmp_path.iterdir():
        refused(lambda path=path: read_table(path), path)
