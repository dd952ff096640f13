"""Limits for untrusted files: JSON, YAML, tables, archives, and what a config file may name."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read, bytes: the calibration of millions of images."""
_DIGITS = 4000  # of an integer that is kept: Python reads and writes no more than 4300
_DEPTH = 64  # of lists and objects in each other: all that is written here has fewer
_FREE = 64 << 20  # bytes that any table may take in memory
_RATIO = 1000  # and how many times the bytes of its file
_ROWS = 1 << 12  # read at a time
_DELTA = "DELTA_BYTE_ARRAY"  # a value may be as long as all values before it, in no bytes


def short(value: object, length: int = 160) -> str:
    """Some text of others on one line without control characters, cut to ``length``."""
    text = "".join(one if one.isprintable() else " " for one in str(value)[: 10 * length])
    text = " ".join(text.split()) or type(value).__name__
    return text if len(text) <= length else f"{text[:length]} ..."


def check_plain(path: Path) -> None:
    """Refuse a FIFO, socket or device, which may have no end or never begin; links are followed.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is not a plain file; the message begins with ``path``.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except OSError as error:  # a circle of links, a folder that may not be entered
        raise ValueError(f"{path} is no plain file: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no plain file")


def check_plain_folder(folder: Path) -> None:
    """``check_plain`` of every file below a folder that a library will read; links are followed.

    Raises:
        ValueError: one of them is something else; the message begins with its path.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:  # a link back to where it is
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        for name in files:
            with suppress(FileNotFoundError):  # a link to nothing, which nobody can read
                check_plain(Path(place, name))


def parse_json(text: str | bytes, any_number: bool = False) -> Any:
    """A JSON value; only what JSON knows, so neither NaN nor numbers beyond float64.

    Args:
        text: the JSON.
        any_number: take NaN, infinities and numbers of any size too. Integers stay exact, beyond
            64 bits as well; those of more than 4000 digits become infinities. A name that an
            object gives twice has the list of its values: which is meant, nobody knows.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has such a number.
    """
    try:
        if any_number:
            value = json.loads(
                text, parse_int=_integer_or_float, object_pairs_hook=_with_all_values
            )
        else:
            value = json.loads(
                text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer
            )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEPTH):
        level = (
            [
                inner
                for one in level
                for inner in (one.values() if isinstance(one, dict) else one)
                if isinstance(inner, (dict, list))
            ]
            if isinstance(value, (dict, list))
            else []
        )
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plain file, too large, or not valid JSON; the message begins with
            ``path``.
    """
    check_plain(path)
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size} bytes, the limit is {limit}")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {short(error)}") from error
    except OSError as error:  # a bad sector: such errors do not say of which file
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Number:
    """Shape of a number, not NaN, from ``low`` to ``high``, both included."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    """Only integers."""


@dataclass(frozen=True)
class Maybe:
    """Shape of a field that may be missing or null."""

    shape: Any


def check_fields(value: Any, shape: Any, name: str) -> None:
    """Refuse a JSON value of another shape.

    Args:
        value: what ``read_json`` returned.
        shape: a type or several; ``Number``; ``[shape]``, a list of values of that shape;
            ``{field: shape}``, an object with these fields among others, where ``Maybe(shape)``
            may be missing or null; ``{str: shape}``, an object with fields of any name.
        name: of the value, which the message begins with.

    Raises:
        ValueError: it is of another shape; the message names the field.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_fields(value, shape.shape, name)
    elif isinstance(shape, Number):
        kind = int if shape.whole else (int, float)
        if (
            isinstance(value, bool)
            or not isinstance(value, kind)
            or not (shape.low <= value <= shape.high)
        ):
            raise ValueError(f"{name} is {short(repr(value), 40)}, not {_described(shape)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is {short(repr(value), 40)}, not a list")
        for place, inner in enumerate(value):
            check_fields(inner, shape[0], f"{name}.{place}")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {short(repr(value), 40)}, not an object")
        for field, inner in shape.items():
            if field is str:
                for other in value:
                    check_fields(value[other], inner, f"{name}.{short(other, 40)}")
            elif field in value or isinstance(inner, Maybe):
                check_fields(value.get(field), inner, f"{name}.{field}")
            else:
                raise ValueError(f"{name} lacks {field}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is int):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"{name} is {short(repr(value), 40)}, not {wanted}")


_KINDS = {str: "text", dict: "an object", list: "a list", bool: "true or false", NoneType: "null"}


def _described(shape: Number) -> str:
    """Such as ``a whole number from 1 to 8``."""
    ends = f" from {shape.low:g}" if shape.low > -math.inf else ""
    ends += f" to {shape.high:g}" if shape.high < math.inf else ""
    return ("a whole number" if shape.whole else "a number") + ends


def read_table(
    path: Path,
    columns: Mapping[str, pa.DataType] | pa.Schema | None = None,
    nullable: tuple[str, ...] = (),
) -> pa.Table:
    """A parquet file that takes no more memory than 64 MiB or 1000 times its size.

    Args:
        path: the file.
        columns: name and type of columns that it must have; others are read as well. None: any.
        nullable: which of them may have missing values.

    Raises:
        ValueError: it cannot be read, has other columns, or missing values; the message begins
            with ``path``.
        FileNotFoundError: there is no such file.
    """
    import pyarrow as pa

    check_plain(path)
    wanted = _as_dict(columns)
    try:
        table = _read(path, _FREE + _RATIO * path.stat().st_size)
        for name, kind in wanted.items():
            if name not in table.column_names or table[name].type != kind:
                raise ValueError(f"it has no column {name} of type {kind}")
            if name not in nullable and table[name].null_count:
                raise ValueError(f"its column {name} has missing values")
    except (ValueError, OSError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {short(error)}") from error
    return table


def _read(path: Path, limit: int) -> pa.Table:
    """The table, in parts whose size is known before they are unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    text = [one.name for one in schema if _is_text(one.type)]
    # Texts stay numbers of a dictionary until it is known how long they are together.
    with pq.ParquetFile(path, read_dictionary=text) as file:
        _check_promised(file.metadata, schema, limit)
        parts, size = [], 0
        for part in file.iter_batches(batch_size=_ROWS):
            size += sum(_unpacked_bytes(column) for column in part.columns)
            if size > limit:
                raise ValueError(f"it unpacks to more than {limit} bytes")
            parts.append(pa.Table.from_batches([part]).cast(schema.remove_metadata()))
        whole = pa.concat_tables(parts) if parts else schema.remove_metadata().empty_table()
        return whole.replace_schema_metadata(schema.metadata)


def _check_promised(found: pq.FileMetaData, schema: pa.Schema, limit: int) -> None:
    """Refuse by its header a table of other kinds of columns, or of more than ``limit`` bytes."""
    for one in schema:
        if not _is_flat(one.type):
            raise ValueError(
                f"its column {one.name} is of type {one.type}, which no table here has"
            )
    bytes_a_row = sum(max(_bit_width(one.type), 8) / 8 for one in schema)
    if found.num_rows * max(bytes_a_row, 1) > limit:
        raise ValueError(f"it says that it has {found.num_rows} rows")
    pages = 0
    for group in range(found.num_row_groups):
        for place in range(found.num_columns):
            column = found.row_group(group).column(place)
            pages += max(column.total_uncompressed_size, 0)
            if _DELTA in column.encodings:
                raise ValueError(f"its column {column.path_in_schema} is encoded as {_DELTA}")
    if pages > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")


def _is_text(kind: pa.DataType) -> bool:
    """Whether values may be of any length: strings and bytes."""
    import pyarrow as pa

    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_flat(kind: pa.DataType) -> bool:
    """Whether a value is a number, a time, a text, or nothing: neither nested nor wide."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_primitive(kind) or pa.types.is_null(kind) or _is_text(kind)


def _bit_width(kind: pa.DataType) -> int:
    import pyarrow as pa

    return int(kind.bit_width) if pa.types.is_primitive(kind) else 32


def _unpacked_bytes(column: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return pc.sum(lengths.cast(pa.int64())).as_py() or 0


def _as_dict(columns: Mapping[str, pa.DataType] | pa.Schema | None) -> dict[str, pa.DataType]:
    import pyarrow as pa

    if isinstance(columns, pa.Schema):
        return {one.name: one.type for one in columns}
    return dict(columns or {})


def _with_all_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names may stand there more than once, with different values."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    values: dict[str, list[Any]] = {name: [] for name in found}
    for name, value in pairs:
        values[name].append(value)
    for name, those in values.items():
        if any(value != those[0] for value in those):
            found[name] = those
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _integer(text: str) -> int:
    if len(text) > 20:  # of 64 bits
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def _integer_or_float(text: str) -> int | float:
    return int(text) if len(text) <= _DIGITS else float(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


MAX_CONFIG_BYTES = 4 << 20
"""Largest option file that is read, bytes."""
MAX_YAML = 1 << 20
"""Values and characters that a YAML text may have once its aliases are written out."""
_OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # ``--config <(command)`` of a shell


def check_config_files(words: Sequence[str]) -> None:
    """Refuse a ``--config`` that has no end, or that nobody writes to.

    Args:
        words: the options of a command. A file that is missing is left to the parser.

    Raises:
        ValueError: a file is a FIFO, device or socket, too large, or not UTF-8; the message names
            it.
    """
    for name in config_files(words):
        try:
            found = Path(name).stat()
        except (OSError, ValueError):
            continue
        if stat.S_ISFIFO(found.st_mode) and name.startswith(_OPENED):
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"--config {name} is no plain file")
        if found.st_size > MAX_CONFIG_BYTES and stat.S_ISREG(found.st_mode):
            raise ValueError(
                f"--config {name} has {found.st_size} bytes, the limit is {MAX_CONFIG_BYTES}"
            )
        if stat.S_ISREG(found.st_mode):
            try:
                Path(name).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"--config {name} is not UTF-8; save it as UTF-8") from error
            except OSError as error:
                raise ValueError(f"--config {name} cannot be read: {error.strerror}") from error


def check_no_further_files(words: Sequence[str], groups: Sequence[str]) -> None:
    """Refuse a path in place of a set of options, which the parser would open.

    Args:
        words: the options of a command.
        groups: names of its sets of options, such as ``plan``. YAML that is not well formed is left
            to the parser.

    Raises:
        ValueError: ``--plan FILE``, or an option file that names a further one.
    """
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    options |= {word.removeprefix("--"): after for word, after in pairwise(words)}
    for group in groups:
        if group in options and isinstance(_loaded(options[group]), str):
            raise ValueError(f"--{group} {short(options[group])} is not a set of options")
    for name in config_files(words):
        if not Path(name).is_file():  # such as the pipe of ``--config <(command)``
            continue
        value = _loaded(Path(name).read_text(encoding="utf-8"))
        if isinstance(value, dict) and "config" in value:
            raise ValueError(
                f"--config {name} names further option files ({short(value['config'])}): give "
                "each on the command line"
            )
        for group in groups:
            for given in _of_group(value, group.split(".")):
                if isinstance(given, str):
                    raise ValueError(
                        f"--config {name}: {group} is {short(given)}, not a set of options"
                    )


def _loaded(text: str) -> Any:
    """The value of a YAML text, None where it is not well formed."""
    import yaml  # `memfree --help` should not wait for it

    check_yaml(text)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _of_group(value: Any, names: list[str]) -> Iterator[Any]:
    """What an option file gives for a set of options: ``a: {b: …}`` or ``a.b: …``."""
    if not isinstance(value, dict):
        return
    for count in range(1, len(names) + 1):
        name, rest = ".".join(names[:count]), names[count:]
        if name in value and rest:
            yield from _of_group(value[name], rest)
        elif name in value:
            yield value[name]


def config_files(words: Sequence[str]) -> list[str]:
    """The files that stand behind ``--config`` on a command line."""
    files = [after for word, after in pairwise(words) if word == "--config"]
    return files + [
        word.removeprefix("--config=") for word in words if word.startswith("--config=")
    ]


def check_yaml(text: str) -> None:
    """Refuse YAML whose aliases (``*name``) would take memory without measure, or that says a thing
    twice, where the parser would take the last.

    YAML that is not well formed is left to whoever reads it next.

    Raises:
        ValueError: written out, it has more than ``MAX_YAML`` values and characters, it contains
            itself, or an object has a key twice.
    """
    if "*" not in text and ":" not in text:  # neither aliases nor objects
        return
    import yaml  # `memfree --help` should not wait for it

    sizes: dict[int, int] = {}
    twice: list[str] = []

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_YAML + 1  # of a node that contains itself
            if isinstance(node, yaml.MappingNode):
                twice.extend(_repeated(key.value for key, _ in node.value))
                inner = sum(size(part) for pair in node.value for part in pair)
            elif isinstance(node, yaml.SequenceNode):
                inner = sum(size(part) for part in node.value)
            else:
                inner = len(node.value)
            sizes[id(node)] = 1 + inner
        return sizes[id(node)]

    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        total = size(root) if root is not None else 0
        large = "*" in text and total > MAX_YAML  # without aliases it is no more than its bytes
    except yaml.YAMLError:
        return
    except RecursionError:
        raise ValueError("--config: its YAML is nested too deeply") from None
    if large:
        raise ValueError(
            f"--config: its YAML has aliases that unpack to more than {MAX_YAML} values, or that "
            "contain themselves"
        )
    if twice:
        raise ValueError(f"--config: {short(twice[0], 60)} stands there twice; leave one")


def _repeated(keys: Iterator[Any]) -> list[str]:
    """Keys of one object that are there more than once; ``<<`` takes keys from elsewhere."""
    count = Counter(key for key in keys if isinstance(key, str) and key != "<<")
    return [key for key, number in count.items() if number > 1]


def limit_aliases() -> None:
    """Put ``check_yaml`` before everything that jsonargparse reads as YAML."""
    from jsonargparse import get_loader, set_loader
    from yaml import YAMLError

    loader = get_loader("yaml")
    if loader.__module__ == __name__:
        return

    def checked(text: str) -> Any:
        check_yaml(text)
        try:
            return loader(text)
        except YAMLError:
            raise
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"--config: {short(error)}") from error

    set_loader("yaml", checked, (YAMLError,))
