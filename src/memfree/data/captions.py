"""Captions of image folders: text files beside pictures, metadata.jsonl, metadata.csv."""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memfree.data.file_names import read_bytes
from memfree.data.options import RecordOptions
from memfree.data.tar_record import MAX_TEXT_BYTES, checked_text, chosen_caption, decode_text
from memfree.folders.untrusted import MAX_JSON_BYTES, parse_json, short

_TEXTS = (".txt", ".caption")
_METADATA = ("metadata.jsonl", "metadata.csv")
_COLUMNS = ("text", "caption")
READ = "captions are read from NAME.txt, NAME.caption, metadata.jsonl or metadata.csv"


class FolderCaptions:
    """Captions of the pictures of one folder, from wherever they stand.

    ``NAME.txt`` and ``NAME.caption`` beside ``NAME.png`` are its captions. ``metadata.jsonl`` and
    ``metadata.csv`` are read as Hugging Face's ImageFolder does: ``file_name`` is a path from their
    own folder, ``text`` or ``caption`` the caption.

    Args:
        folder: the folder of the pictures.
        images: its pictures.
        others: the other files in it.
        options: which captions are meant where there is a choice.
        prefix: of these options on the command line.
        note: takes files that hold no caption of a picture.
        foreign: pictures that are not read, and named elsewhere.

    Attributes:
        present: whether any picture has a caption.

    Raises:
        ValueError: metadata cannot be read, or is in a format that is not.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[Path],
        others: Iterable[Path],
        options: RecordOptions,
        prefix: str,
        note: Callable[[str], None],
        foreign: Iterable[Path] = (),
    ) -> None:
        self._folder, self._source = folder, options.caption_source
        self._prefix = prefix
        self._stems = Counter(image.with_suffix("") for image in images)
        self._names = {image.relative_to(folder).as_posix() for image in images}
        self._beside: defaultdict[Path, dict[str, list[Path]]] = defaultdict(dict)
        self._listed: dict[str, str | None] = {}
        self._lost: list[str] = []
        others = list(others)
        known = {file.relative_to(folder).as_posix() for file in (*others, *foreign)}
        for file in others:
            name, kind = file.relative_to(folder).as_posix(), file.suffix.lower()
            if self._is_meant(kind[1:]) and kind in _TEXTS and file.with_suffix("") in self._stems:
                self._beside[file.with_suffix("")].setdefault(kind[1:], []).append(file)
            elif self._is_meant("metadata") and file.name.lower() in _METADATA:
                self._read_metadata(file, known, note)
            elif self._is_meant("metadata") and file.name.lower() == "metadata.parquet":
                raise ValueError(
                    f"{short(file, 1000)} is not read: {READ}; convert it, or pass "
                    f"{prefix}caption_source"
                )
            else:
                note(name)
        self.present = bool(self._beside or self._listed)

    def of(self, image: Path) -> str | None:
        """The caption of a picture; None where no picture has one.

        Raises:
            ValueError: its text cannot be read, or there is more than one reading of it.
            FileNotFoundError: it has none, but others do.
        """
        if not self.present:
            return None
        name = image.relative_to(self._folder).as_posix()
        shown = short(image, 1000)
        beside = self._beside.get(image.with_suffix(""), {})
        if beside and self._stems[image.with_suffix("")] > 1:
            raise ValueError(
                f"{shown} shares its caption with a picture of another format; pass "
                f"{self._prefix}image_suffix to choose one"
            )
        captions: dict[str, str] = {}
        for kind, files in beside.items():
            if len(files) > 1:
                raise ValueError(f"{shown} has {' and '.join(file.name for file in files)}")
            captions[kind] = read_text(files[0]).strip()
        if self._listed.get(name) is not None:
            captions["metadata"] = str(self._listed[name]).strip()
        option = f"{self._prefix}caption_source"
        caption = chosen_caption(shown, captions, self._source, option)
        if caption is None:
            raise FileNotFoundError(
                f"{shown}: other images have a caption, {image.with_suffix('.txt').name} does not "
                "exist and no metadata gives one"
            )
        return caption

    def lost_rows(self) -> Iterator[str]:
        """What is wrong with rows of metadata that belong to no picture."""
        yield from self._lost

    def _is_meant(self, kind: str) -> bool:
        return self._source in ("any", kind)

    def _read_metadata(self, file: Path, others: set[str], note: Callable[[str], None]) -> None:
        shown = short(file, 1000)
        rows, columns = _rows(file)
        if not rows:
            note(f"{file.relative_to(self._folder).as_posix()}: no rows")
            return
        if "file_name" not in columns:
            note(f"{file.relative_to(self._folder).as_posix()}: no column file_name")
            return
        captions = [column for column in _COLUMNS if column in columns]
        if len(captions) > 1:
            raise ValueError(f"{shown} has columns text and caption; leave the one that is meant")
        rest = sorted(columns - {"file_name", *captions})
        if rest or not captions:
            without = "" if captions else "no column text or caption; "
            note(
                f"{file.relative_to(self._folder).as_posix()}: {without}"
                f"not read: {', '.join(rest) or 'file_name'}"
            )
        if not captions:
            return
        place = file.parent.relative_to(self._folder).as_posix()
        for number, row in rows:
            name = posixpath.normpath(posixpath.join(place, str(row.get("file_name"))))
            if name in others:
                continue  # named where other files are left out
            if name not in self._names:
                self._lost.append(
                    f"{shown}, line {number}: there is no picture {short(name, 1000)}"
                )
                continue
            caption = _caption(row.get(captions[0]), f"{shown}, line {number}")
            if self._listed.get(name, caption) != caption:
                raise ValueError(f"{shown}, line {number}: another caption of {short(name, 1000)}")
            self._listed[name] = caption


def read_text(file: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not a plain file, is too large, or in an unknown encoding.
        OSError: it cannot be read.
    """
    return decode_text(read_bytes(file, limit), short(file, 1000))


def _rows(file: Path) -> tuple[list[tuple[int, dict[str, Any]]], set[str]]:
    """(line number, row) of a metadata file, and its columns."""
    text, shown = read_text(file, MAX_JSON_BYTES), short(file, 1000)
    rows: list[tuple[int, dict[str, Any]]] = []
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            header = Counter(reader.fieldnames or ())
            for column in ("file_name", *_COLUMNS):
                if header[column] > 1:
                    raise ValueError(f"{shown} has {header[column]} columns {column}; leave one")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{shown}, line {reader.line_num}: as many cells as columns")
                rows.append((reader.line_num, row))
        except csv.Error as error:
            raise ValueError(f"{shown}, line {reader.line_num}: {short(error)}") from error
        return rows, set(reader.fieldnames or ())
    columns: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, any_number=True)
        except ValueError as error:
            raise ValueError(f"{shown}, line {number}: not valid JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name", ""), str):
            raise ValueError(f"{shown}, line {number}: no object with a file_name")
        rows.append((number, row))
        columns |= row.keys()
    return rows, columns


def _caption(value: Any, name: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    endless = isinstance(value, float) and math.isinf(value)
    if isinstance(value, (bool, list, dict)) or endless:
        raise ValueError(f"{name}: its caption is {short(json.dumps(value))}, not text")
    return checked_text(str(value), f"{name}: its caption")
