"""Text beside a picture: its encoding, and which of several captions is meant."""

from __future__ import annotations

import codecs
from collections.abc import Mapping

from memfree.data.options import CaptionSource

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes, name: str) -> str:
    """A text in UTF-8, or in what its byte-order mark says (UTF-8, UTF-16, UTF-32).

    Args:
        data: the encoded text.
        name: what to call it in an error.

    Raises:
        ValueError: it is in another encoding, or has characters that no caption has.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} (Latin-1?); save it as UTF-8"
        ) from error
    return checked_text(text, name)


def checked_text(text: str, name: str) -> str:
    """The text itself, unless a wrong encoding has spoilt it.

    Raises:
        ValueError: it has NUL or replacement characters, or is not text that UTF-8 can hold.
    """
    if "\0" in text:
        raise ValueError(f"{name} has NUL characters; save it as UTF-8")
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise ValueError(f"{name} has replacement characters (U+FFFD): its text was lost before")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no text that can be written as UTF-8") from error
    return text


def chosen_caption(
    name: str, captions: Mapping[str, str], source: CaptionSource, option: str
) -> str | None:
    """The caption of a picture.

    Args:
        name: what to call the picture in an error.
        captions: its captions by where they stand (see :data:`CaptionSource`).
        source: which is meant; ``any``: whichever there is.
        option: the option that gives ``source``, for the error.

    Raises:
        ValueError: there are several different ones and ``source`` does not say which.
    """
    if source != "any":
        return captions.get(source)
    if len({text.strip() for text in captions.values()}) > 1:
        raise ValueError(
            f"{name} has different captions ({' and '.join(captions)}); "
            f"say with {option} which is meant"
        )
    return next(iter(captions.values()), None)
