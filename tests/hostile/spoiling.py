"""Ways to spoil a file of a whole folder: JSON of other values, tables of other columns."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
from hostile_payloads import WRONG_JSON
from pyarrow import parquet


def edit(path, *keys_and_value):
    """Replace the value at a path of keys in a JSON file."""
    *keys, last, value = keys_and_value
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(whole))


def places(value, *before):
    """Every place in a JSON value, as keys."""
    yield from [before] if before else []
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, *before, key)


def wrong_json(name):
    """Functions that replace a JSON file of a folder by something else."""
    return {
        f"{name}: {what}": lambda folder, text=text: (folder / name).write_bytes(text)
        for what, text in WRONG_JSON.items()
    }


def rewritten(folder, name, change):
    """Replace a table by what ``change`` makes of it."""
    path = folder / name
    parquet.write_table(change(parquet.read_table(path)), path)
    _declare(folder, name)


def _declare(folder, name):
    """Let the manifest agree, as whoever wrote the folder would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if name in (manifest.get("files") or {}):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        edit(folder / "manifest.json", "files", name, digest)


def filled(column, value, kind=pa.int64()):  # noqa: B008 - an immutable value
    """A change of a table: this column holds ``value`` in every row."""

    def change(table):
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array([value] * table.num_rows, kind))

    return change


def repeated(rows, text_bytes):
    """A change to a table of so many rows of one long text: few bytes that unpack to many."""

    def change(table):
        columns = {}
        for field in table.schema:
            if pa.types.is_string(field.type):
                words = pa.DictionaryArray.from_arrays(
                    pa.array([0], pa.int32()).take(pa.array([0] * rows)), ["x" * text_bytes]
                )
                columns[field.name] = words
            else:
                columns[field.name] = pa.array([0]).cast(field.type).take(pa.array([0] * rows))
        return pa.table(columns)

    return change


def bomb(folder, name, rows=1 << 20, text_bytes=1 << 20):
    """Replace a table by such a bomb, whose file says that its texts are plain strings."""
    path = Path(folder) / name
    schema = parquet.read_schema(path)
    table = repeated(rows, text_bytes)(parquet.read_table(path))
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert parquet.read_schema(path).names == schema.names
    _declare(folder, name)
