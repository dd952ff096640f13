"""A record of a tar file: its picture, caption, label and JSON fields, checked."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memfree.data.file_names import MAX_NAME, OTHER_PICTURES, SUFFIXES, is_text
from memfree.data.options import CaptionSource, RecordOptions
from memfree.folders.untrusted import parse_json, short

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes, name: str) -> str:
    """Text in UTF-8, or as its byte-order mark says; ``name`` is for errors."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} (Latin-1?); save it as UTF-8"
        ) from error
    return checked_text(text, name)


def checked_text(text: str, name: str) -> str:
    """The text itself; ValueError if a wrong encoding has damaged it."""
    if "\0" in text:
        raise ValueError(f"{name} has NUL characters; save it as UTF-8")
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise ValueError(f"{name} has replacement characters (U+FFFD): its text was lost before")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} cannot be written as UTF-8") from error
    return text


def caption_of(value: Any, name: str) -> str | None:
    """Caption from JSON or a table; None if it is missing."""
    if _is_missing(value):
        return None
    endless = isinstance(value, float) and math.isinf(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or endless:
        raise ValueError(f"{name} is {short(repr(value))}, not text")
    return checked_text(str(value), name)


def chosen_caption(
    name: str, captions: Mapping[str, str], source: CaptionSource, option: str
) -> str | None:
    """Caption by place: ``source`` chooses between ``captions``, ``option`` is its name."""
    if source != "any":
        return captions.get(source)
    if len({text.strip() for text in captions.values()}) > 1:
        raise ValueError(
            f"{name} has different captions ({' and '.join(captions)}); pass {option} to choose one"
        )
    return next(iter(captions.values()), None)


MAX_TEXT_BYTES = 1 << 20
"""Largest caption, class or JSON member that is read, bytes."""
MAX_LABEL = 99_999
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
TEXTS = ("txt", "caption", "cls", "json")
"""Suffixes of members that describe an image."""
_OTHER_IMAGES = tuple(suffix[1:] for suffix in OTHER_PICTURES)


@dataclass
class Member:
    """One file of a sample."""

    name: str
    suffix: str
    """What follows the key, lower case; may contain dots."""
    read: Callable[[], bytes]
    problem: str | None = None
    """Why it is not read, to follow its name."""


@dataclass
class TarRecord:
    """Undecoded record of a third-party shard."""

    name: str
    """Shard and key, for messages and as the image's key; never used as a file name."""
    image: bytes
    caption: str | None
    label: int | None
    image_key: str | None
    group: str | None


def _ending(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def is_wanted(suffix: str) -> bool:
    """Whether a member with this suffix may be a record's picture or describe it."""
    return _ending(suffix) in (*IMAGES, *_OTHER_IMAGES, *TEXTS)


def record_of(
    name: str,
    members: Iterable[Member],
    options: RecordOptions,
    prefix: str,
    note: Callable[[str], None],
) -> TarRecord:
    """Record of the members that share its key; ``note`` receives those left out."""
    shown = short(name)
    by_suffix: dict[str, Member] = {}
    for member in members:
        if member.suffix in by_suffix:
            raise ValueError(f"{shown}: two members have the suffix .{short(member.suffix, 40)}")
        by_suffix[member.suffix] = member
    image = _image(shown, by_suffix, options, prefix)
    source = options.caption_source
    meant = TEXTS if source == "any" else ("cls", "json", source)
    texts = {suffix: by_suffix[suffix] for suffix in TEXTS if suffix in by_suffix}
    texts = {suffix: member for suffix, member in texts.items() if suffix in meant}
    for member in (image, *texts.values()):
        if member.problem:
            raise ValueError(f"{shown}: {member.problem}")
    meta = _json(shown, texts.pop("json").read()) if "json" in texts else {}
    captions = {
        suffix: decode_text(member.read(), f"{shown}: its .{suffix}")
        for suffix, member in texts.items()
    }
    label = _one_label(shown, captions.pop("cls", None), meta.get("label"))
    if source in ("any", "json"):
        caption = caption_of(meta.get("caption"), f"{shown}: its caption in .json")
        captions |= {"json": caption} if caption is not None else {}
    record = TarRecord(
        name,
        image.read(),
        chosen_caption(shown, captions, source, f"{prefix}caption_source"),
        label,
        _declared(shown, meta, "image_key"),
        _declared(shown, meta, "group"),
    )
    for suffix, member in by_suffix.items():
        if member is not image and (suffix not in TEXTS or suffix not in meant):
            note(f"{member.name}: a further part of {shown}")
    return record


def _image(name: str, members: dict[str, Member], options: RecordOptions, prefix: str) -> Member:
    wanted = options.suffix()
    if wanted is not None:
        if wanted not in members:
            raise ValueError(f"{name}: record without .{short(wanted, 40)}, the image_suffix")
        return members[wanted]
    images = sorted(suffix for suffix in members if suffix in IMAGES)
    if len(images) > 1:
        raise ValueError(
            f"{name} has {len(images)} pictures; pass {prefix}image_suffix to choose one: "
            f"{' or '.join(images)}"
        )
    if images:
        return members[images[0]]
    parts = [suffix for suffix in members if _ending(suffix) in IMAGES]
    if parts:
        which = f"{prefix}image_suffix {short(min(parts), 40)}"
        if options.key_ends == "ask":
            raise ValueError(
                f"{name}: is {short(members[parts[0]].name)} a record of its own "
                f"({prefix}key_ends last_dot) or the picture of this one ({which})?"
            )
        raise ValueError(f"{name}: record without a picture of its own; pass {which}")
    others = [suffix for suffix in members if _ending(suffix) in _OTHER_IMAGES]
    is_of = f"; its .{short(others[0], 40)} is not read" if others else ""
    raise ValueError(f"{name}: record without a PNG, JPEG or WEBP image{is_of}")


def _json(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data, any_number=True)  # img2dataset writes NaN
    except ValueError as error:
        raise ValueError(f"{name}: its .json is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: its .json is not an object but {short(repr(value), 40)}")
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _one_label(name: str, stated: str | None, in_json: Any) -> int | None:
    """Class in .cls or else in the JSON; a JSON class name does not matter beside .cls."""
    if stated is None:
        return None if _is_missing(in_json) else _label(name, in_json)
    label = _label(name, stated.strip())
    for other in in_json if isinstance(in_json, list) else [in_json]:
        if _number(other) not in (None, label):
            shown = short(other, 40)
            raise ValueError(f"{name}: its class is {label} in .cls, but {shown} in .json")
    return label


def _number(value: Any) -> int | float | None:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return number if is_number and not _is_missing(number) else None


def _label(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError("not a whole number")
        label = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: class {short(repr(value), 40)} is not a number") from error
    if not 0 <= label <= MAX_LABEL:
        raise ValueError(f"{name}: class {short(label, 40)} is not in 0..{MAX_LABEL}")
    return label


def _declared(name: str, meta: dict[str, Any], field: str) -> str | None:
    value = meta.get(field)
    if _is_missing(value) or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name}: its {field} is {short(repr(value), 40)}, not text")
    value = str(value)
    if len(value) > MAX_NAME:
        raise ValueError(f"{name}: its {field} has {len(value)} characters; at most {MAX_NAME}")
    if not is_text(value):
        raise ValueError(f"{name}: its {field} has control characters")
    return value
