"""One record of a WebDataset tar of others: its image, caption, class and what its JSON says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memfree.data.decode import SUFFIXES
from memfree.untrusted import parse_json, short

MAX_TEXT_BYTES = 1 << 20
"""Largest caption, class or JSON member that is read, bytes."""
MAX_LABEL = 99_999
"""Largest class number that is believed."""
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
"""Suffixes of members that are images."""
TEXTS = ("txt", "cls", "json")
"""Suffixes of members that say something about one."""


@dataclass
class TarRecord:
    """One record of a foreign shard, not yet decoded."""

    name: str
    """Shard and key, for messages and as the image's key; never used as a file name."""
    image: bytes
    caption: str | None
    label: int | None
    image_key: str | None
    """Declared by our own shards."""
    group: str | None
    """Declared by our own shards."""


def record_of(name: str, members: dict[str, bytes | str]) -> TarRecord:
    """The record of these members, by suffix; ``error`` says what is wrong with one of them.

    Raises:
        ValueError: there is no image, or a member is not what its suffix says.
    """
    if "error" in members:
        raise ValueError(f"{name}: {_text(members['error'])}")
    images = [members[suffix] for suffix in IMAGES if suffix in members]
    if not images:
        raise ValueError(f"{name}: record without a PNG, JPEG or WEBP image")
    meta = _json(name, members.get("json", b"{}"))
    caption = meta.get("caption")
    if "txt" in members:
        caption = _text(members["txt"])
    label = meta.get("label")
    if "cls" in members:
        label = _text(members["cls"]).strip()
    if caption is not None and (
        isinstance(caption, bool) or not isinstance(caption, (str, int, float))
    ):
        raise ValueError(f"{name}: its caption is {short(repr(caption))}, no text")
    return TarRecord(
        name,
        bytes(images[0]),  # type: ignore[arg-type]
        _writable(name, str(caption)) if caption is not None else None,
        _label(name, label) if label is not None else None,
        _declared(name, meta, "image_key"),
        _declared(name, meta, "group"),
    )


def _text(data: bytes | str) -> str:
    return data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data


def _json(name: str, data: bytes | str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{name}: its .json is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: its .json is no object but {short(repr(value), 40)}")
    return value


def _label(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError("not a whole number")
        label = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: class {short(repr(value), 40)} is not a number") from error
    if not 0 <= label <= MAX_LABEL:
        raise ValueError(f"{name}: class {label} is not in 0..{MAX_LABEL}")
    return label


def _declared(name: str, meta: dict[str, Any], field: str) -> str | None:
    value = meta.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        return None
    if not value.isprintable():
        raise ValueError(f"{name}: its {field} has control characters")
    return value


def _writable(name: str, text: str) -> str:
    """Text that UTF-8 can hold: JSON can escape what is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: its caption is no text that can be written") from error
    return text
