"""Captions of image folders: text files beside pictures, metadata.jsonl, metadata.csv."""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from memfree.data.file_names import read_bytes
from memfree.data.options import RecordOptions
from memfree.data.tar_record import MAX_TEXT_BYTES, caption_of, chosen_caption, decode_text
from memfree.folders.untrusted import MAX_JSON_BYTES, parse_json, short

_COLUMNS = ("text", "caption")
READ = "captions are read from NAME.txt, NAME.caption, metadata.jsonl or metadata.csv"


class FolderCaptions:
    """Captions of one folder's pictures: NAME.txt, NAME.caption, metadata.jsonl or .csv.

    Metadata as in Hugging Face's ImageFolder: ``file_name``, relative to its file; ``text`` or
    ``caption``. ``note`` receives files without a use, ``lost`` errors in rows without a picture;
    pictures in ``foreign`` are reported elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[Path],
        others: Sequence[Path],
        options: RecordOptions,
        note: Callable[[str], None],
        foreign: Iterable[Path] = (),
    ) -> None:
        self._folder, self._source = folder, options.caption_source
        self._stems = Counter(image.with_suffix("") for image in images)
        self._names = {self._name(image) for image in images}
        self._beside: defaultdict[Path, dict[str, list[Path]]] = defaultdict(dict)
        self._listed: dict[str, str | None] = {}
        self.lost: list[str] = []
        known = {self._name(file) for file in (*others, *foreign)}
        for file in others:
            kind, name = file.suffix.lower()[1:], file.name.lower()
            stem = file.with_suffix("")
            if kind in ("txt", "caption") and self._is_meant(kind) and stem in self._stems:
                self._beside[stem].setdefault(kind, []).append(file)
            elif not name.startswith("metadata.") or not self._is_meant("metadata"):
                note(self._name(file))
            elif kind in ("jsonl", "csv"):
                self._read_metadata(file, known, note)
            elif kind == "parquet":
                raise ValueError(
                    f"{short(file, 1000)} is not read: {READ}; convert it, or pass "
                    "--records.caption_source"
                )
            else:
                note(self._name(file))
        self.present = bool(self._beside or self._listed)

    def of(self, image: Path) -> str | None:
        """Caption of a picture; None if no picture has any, FileNotFoundError if others have."""
        if not self.present:
            return None
        shown, stem = short(image, 1000), image.with_suffix("")
        beside = self._beside.get(stem, {})
        if beside and self._stems[stem] > 1:
            raise ValueError(
                f"{shown} shares its caption with a picture of another format; pass "
                "--records.image_suffix to choose one"
            )
        captions: dict[str, str] = {}
        for kind, files in beside.items():
            if len(files) > 1:
                raise ValueError(f"{shown} has {' and '.join(file.name for file in files)}")
            captions[kind] = _read_text(files[0]).strip()
        listed = self._listed.get(self._name(image))
        if listed is not None:
            captions["metadata"] = listed.strip()
        caption = chosen_caption(shown, captions, self._source, "--records.caption_source")
        if caption is None:
            raise FileNotFoundError(
                f"{shown}: other images have a caption, {stem.name}.txt does not exist and no "
                "metadata gives one"
            )
        return caption

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _is_meant(self, kind: str) -> bool:
        return self._source in ("any", kind)

    def _read_metadata(self, file: Path, others: set[str], note: Callable[[str], None]) -> None:
        shown = short(file, 1000)
        rows, columns = _rows(file)
        if not rows or "file_name" not in columns:
            note(f"{self._name(file)}: no {'column file_name' if rows else 'rows'}")
            return
        captions = [column for column in _COLUMNS if column in columns]
        if len(captions) > 1:
            raise ValueError(f"{shown} has columns text and caption; leave the one that is meant")
        rest = ", ".join(sorted(columns - {"file_name", *captions}))
        if not captions:
            note(f"{self._name(file)}: no column text or caption; not read: {rest or 'file_name'}")
            return
        if rest:
            note(f"{self._name(file)}: not read: {rest}")
        place = posixpath.dirname(self._name(file))
        for number, row in rows:
            name = posixpath.normpath(posixpath.join(place, str(row.get("file_name"))))
            if name in others:
                continue  # named where other files are left out
            where = f"{shown}, line {number}"
            if name not in self._names:
                self.lost.append(f"{where}: there is no picture {short(name, 1000)}")
                continue
            caption = caption_of(row.get(captions[0]), f"{where}: its caption")
            if self._listed.setdefault(name, caption) != caption:
                raise ValueError(f"{where}: another caption of {short(name, 1000)}")


def _read_text(file: Path, limit: int = MAX_TEXT_BYTES) -> str:
    return decode_text(read_bytes(file, limit), short(file, 1000))


def _rows(file: Path) -> tuple[list[tuple[int, dict[str, Any]]], set[str]]:
    text, shown = _read_text(file, MAX_JSON_BYTES), short(file, 1000)
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: set[str] = set()
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
        return rows, set(header)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, any_number=True)
        except ValueError as error:
            raise ValueError(f"{shown}, line {number}: not valid JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name", ""), str):
            raise ValueError(f"{shown}, line {number}: not an object with a file_name")
        rows.append((number, row))
        columns |= row.keys()
    return rows, columns
