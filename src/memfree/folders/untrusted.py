"""Limits for untrusted files: JSON, YAML, tables, archives, and what a config file may name."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_JSON_BYTES = 256 << 20  # the calibration of millions of images
_DIGITS = 4000  # of an integer that is kept: Python reads and writes no more than 4300
_DEPTH = 64  # of lists and objects in each other: all that is written here has fewer
_FREE = 64 << 20  # bytes that any table may take in memory
_RATIO = 1000  # and how many times the bytes of its file
_ROWS = 1 << 12  # read at a time
_DELTA = "DELTA_BYTE_ARRAY"  # a value may be as long as all values before it, in no bytes


def short(value: object, length: int = 160) -> str:
    """Untrusted text on one line without control characters, cut to ``length``."""
    text = "".join(char if char.isprintable() else " " for char in str(value)[: 10 * length])
    text = " ".join(text.split()) or type(value).__name__
    return text if len(text) <= length else f"{text[:length]} ..."


def check_plain(path: Path) -> None:
    """Refuse a FIFO, socket or device, which may have no end or never begin; follows links."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except OSError as error:  # a circle of links, a folder that may not be entered
        raise ValueError(f"{path} is not a plain file: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a plain file")


def check_plain_folder(folder: Path) -> None:
    """``check_plain`` every file below a folder that a library will read."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where it is
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            with suppress(FileNotFoundError):  # a link to nothing, which nobody can read
                check_plain(Path(place, name))


def parse_json(text: str | bytes, any_number: bool = False) -> Any:
    """Parse JSON; refuses NaN, numbers beyond float64 and deep nesting with ValueError.

    ``any_number`` accepts NaN, infinities and numbers of any size: integers stay exact up to 4000
    digits, longer ones become infinities. A name with several values in one object gets their list.
    """
    try:
        value = (
            json.loads(text, parse_int=_integer_or_float, object_pairs_hook=_with_all_values)
            if any_number
            else json.loads(
                text, parse_constant=_not_a_number, parse_float=_finite, parse_int=_integer
            )
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEPTH + 1):
        level = [inner for outer in level for inner in _containers(outer)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def _containers(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, (dict, list))]


def _with_all_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {
        name: every if any(value != every[0] for value in every[1:]) else every[-1]
        for name, every in values.items()
    }


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to a read error, as of a bad sector."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path, limit: int) -> str:
    """UTF-8 text of a plain file of at most ``limit`` bytes; errors begin with ``path``."""
    check_plain(path)
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size} bytes, the limit is {limit}")
    try:
        with named(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; save it as UTF-8") from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES, any_number: bool = False) -> Any:
    """JSON value of a file, see ``read_text`` and ``parse_json``."""
    text = read_text(path, limit)
    try:
        return parse_json(text, any_number)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {short(error)}") from error


@dataclass(frozen=True)
class Number:
    """Shape of a number, not NaN, from ``low`` to ``high`` inclusive."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        ends = f" from {self.low:g}" if self.low > -math.inf else ""
        ends += f" to {self.high:g}" if self.high < math.inf else ""
        return ("a whole number" if self.whole else "a number") + ends

    def __contains__(self, value: object) -> bool:
        kind = int if self.whole else (int, float)
        return (
            isinstance(value, kind)
            and not isinstance(value, bool)
            and self.low <= value <= self.high  # type: ignore[operator]
        )


@dataclass(frozen=True)
class Maybe:
    """Shape of a field that may be missing or null."""

    shape: Any


_KINDS = {str: "text", dict: "an object", list: "a list", bool: "true or false", NoneType: "null"}


def check_fields(value: Any, shape: Any, name: str) -> None:
    """Refuse a JSON value of another shape, in a message that begins with the field's name.

    ``shape``: a type or several; ``Number``; ``[shape]``, a list of such values; ``{field:
    shape}``, an object with these fields among others (``Maybe(shape)`` may be missing or null); or
    ``{str: shape}``, an object with any fields of that shape.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_fields(value, shape.shape, name)
        return
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(shape, (list, dict)):
        kinds = (type(shape),)
    if isinstance(shape, Number):
        wanted, is_wanted = str(shape), value in shape
    else:
        wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
        is_wanted = isinstance(value, kinds) and not (isinstance(value, bool) and shape is int)
    if not is_wanted:
        raise ValueError(f"{name} is {short(repr(value), 40)}, not {wanted}")
    if isinstance(shape, list):
        for place, inner in enumerate(value):
            check_fields(inner, shape[0], f"{name}.{place}")
    elif isinstance(shape, dict):
        for field, inner in shape.items():
            if field is str:
                for key in value:
                    check_fields(value[key], inner, f"{name}.{short(key, 40)}")
            elif field in value or isinstance(inner, Maybe):
                check_fields(value.get(field), inner, f"{name}.{field}")
            else:
                raise ValueError(f"{name} lacks {field}")


def read_table(
    path: Path,
    columns: Mapping[str, pa.DataType] | pa.Schema | None = None,
    nullable: tuple[str, ...] = (),
) -> pa.Table:
    """Read a parquet file in at most 64 MiB or 1000 times its size of memory.

    ``columns``: names and types of required columns, None: any; ``nullable``: columns that may have
    missing values. A ValueError begins with ``path``.
    """
    import pyarrow as pa

    check_plain(path)
    if isinstance(columns, pa.Schema):
        columns = {field.name: field.type for field in columns}
    try:
        table = _read(path, _FREE + _RATIO * path.stat().st_size)
        for name, kind in (columns or {}).items():
            if name not in table.column_names or table[name].type != kind:
                raise ValueError(f"it has no column {name} of type {kind}")
            if name not in nullable and table[name].null_count:
                raise ValueError(f"its column {name} has missing values")
    except (ValueError, OSError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {short(error)}") from error
    return table


def _read(path: Path, limit: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    text = [field.name for field in schema if _is_text(field.type)]
    # Texts stay dictionary indices until their total length is known.
    with pq.ParquetFile(path, read_dictionary=text) as file:
        _check_header(file.metadata, schema, limit)
        parts, size = [], 0
        for part in file.iter_batches(batch_size=_ROWS):
            size += sum(_unpacked_bytes(column) for column in part.columns)
            if size > limit:
                raise ValueError(f"it unpacks to more than {limit} bytes")
            parts.append(pa.Table.from_batches([part]).cast(schema.remove_metadata()))
        whole = pa.concat_tables(parts) if parts else schema.remove_metadata().empty_table()
        return whole.replace_schema_metadata(schema.metadata)


def _check_header(header: pq.FileMetaData, schema: pa.Schema, limit: int) -> None:
    import pyarrow as pa

    bits = 0  # a row
    for field in schema:
        kind = field.type
        is_plain = pa.types.is_primitive(kind) or pa.types.is_null(kind) or _is_text(kind)
        if not (_is_text(kind.value_type) if pa.types.is_dictionary(kind) else is_plain):
            raise ValueError(f"its column {field.name} is of type {kind}, which no table here has")
        bits += max(int(kind.bit_width) if pa.types.is_primitive(kind) else 32, 8)
    if header.num_rows * max(bits / 8, 1) > limit:
        raise ValueError(f"it says that it has {header.num_rows} rows")
    pages = 0
    for group in range(header.num_row_groups):
        for place in range(header.num_columns):
            column = header.row_group(group).column(place)
            pages += max(column.total_uncompressed_size, 0)
            if _DELTA in column.encodings:
                raise ValueError(f"its column {column.path_in_schema} is encoded as {_DELTA}")
    if pages > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _unpacked_bytes(column: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return pc.sum(lengths.cast(pa.int64())).as_py() or 0


_MAX_CONFIG_BYTES = 4 << 20
_MAX_YAML = 1 << 20  # values and characters of a YAML text once its aliases are written out
_OPENED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # ``--config <(command)`` of a shell


def config_files(words: Sequence[str]) -> list[str]:
    """Files behind ``--config`` on a command line."""
    files = [after for word, after in pairwise(words) if word == "--config"]
    prefix = "--config="
    return files + [word.removeprefix(prefix) for word in words if word.startswith(prefix)]


def check_config_files(words: Sequence[str]) -> None:
    """Refuse a ``--config`` that is endless, a FIFO without a writer, too large, or not UTF-8."""
    for name in config_files(words):
        path = Path(name)
        try:
            if not path.is_dir() and not (name.startswith(_OPENED) and path.is_fifo()):
                read_text(path, _MAX_CONFIG_BYTES)
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            raise ValueError(f"--config {error}") from error


def check_no_further_files(words: Sequence[str], groups: Sequence[str]) -> None:
    """Refuse a path in place of an option group such as ``plan``: the parser would open it."""
    options = dict(word.split("=", 1) for word in words if "=" in word) | dict(pairwise(words))
    for option in (f"--{group}" for group in groups):
        if option in options and isinstance(load_yaml(options[option]), str):
            raise ValueError(f"{option} {short(options[option])} is not a set of options")
    for name in config_files(words):
        if not Path(name).is_file():  # such as the pipe of ``--config <(command)``
            continue
        value = load_yaml(Path(name).read_text(encoding="utf-8"))
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


def _of_group(value: Any, names: list[str]) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    for count in range(1, len(names) + 1):
        name, rest = ".".join(names[:count]), names[count:]
        if name in value and rest:
            yield from _of_group(value[name], rest)
        elif name in value:
            yield value[name]


def load_yaml(text: str) -> Any:
    """Value of a YAML text that ``check_yaml`` accepts; None if malformed."""
    import yaml  # `memfree --help` should not wait for it

    check_yaml(text)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def check_yaml(text: str) -> None:
    """Refuse YAML with exploding aliases (``*name``) or duplicate keys; ignores malformed YAML."""
    if "*" not in text and ":" not in text:  # neither aliases nor objects
        return
    import yaml  # `memfree --help` should not wait for it

    sizes: dict[int, int] = {}
    twice: list[str] = []

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_YAML + 1  # of a node that contains itself
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
    except yaml.YAMLError:
        return
    except RecursionError:
        raise ValueError("--config: its YAML is nested too deeply") from None
    if "*" in text and total > _MAX_YAML:  # without aliases it is no more than its bytes
        raise ValueError(
            f"--config: its YAML has aliases that unpack to more than {_MAX_YAML} values, or that "
            "contain themselves"
        )
    if twice:
        raise ValueError(f"--config: {short(twice[0], 60)} is given twice; keep one")


def _repeated(keys: Iterable[Any]) -> list[str]:
    """Duplicate keys of one object; ``<<`` may repeat keys from elsewhere."""
    count = Counter(key for key in keys if isinstance(key, str) and key != "<<")
    return [key for key, number in count.items() if number > 1]


def limit_aliases() -> None:
    """Apply ``check_yaml`` to everything that jsonargparse reads as YAML."""
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
