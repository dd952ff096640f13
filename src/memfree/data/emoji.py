"""Source ``emoji``: pictures of a color emoji font, with their names as captions."""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image

from memfree.data.skipped import LeftOut, Skipped, skipping
from memfree.data.sources import SHARES, SourceImage
from memfree.images import open_image, to_array

_COLOURS = "red|orange|yellow|green|blue|purple|brown|black|white"
_ZODIAC = (
    "aries|taurus|gemini|cancer|leo|virgo|libra|scorpius|sagittarius|capricorn|aquarius|pisces|"
    "ophiuchus"
)
_CREEDS = (
    "(orthodox|latin) cross|star and crescent|peace symbol|yin yang|wheel of dharma|star of david|"
    "om symbol|menorah.*|six pointed star.*|atom symbol|place of worship"
)
FAMILIES = {
    "clock face": "clock face .*|mantelpiece clock",
    "moon": r".*\bmoon (symbol|with face)",
    "arrow button": (
        "(left right|up down|(north|south) (west|east)) arrow|"
        "(black |twisted |clockwise |anticlockwise )?\\w+wards.* arrows?.*|"
        "\\w+wards black arrow|arrow pointing .*|(back|end|on|soon|top) with .*arrow above|"
        "black .*triangle.*|.*-pointing small red triangle|eject symbol|double vertical bar|"
        "black (square for stop|circle for record)|cinema|(low|high) brightness symbol|"
        "antenna with bars"
    ),
    "framed sign": f"{_ZODIAC}|{_CREEDS}",
    "framed word": (
        "(negative )?squared .*|(circled|input symbol) .*|keycap ten|.*in square|information source"
    ),
    "pictogram": (
        "(wheelchair|mens|womens|baby|potable water|put litter in its place) symbol|restroom|"
        "water closet|passport control|customs|baggage claim|left luggage|(fe)?male sign|"
        "automated teller machine"
    ),
    "forbidden": "no .*|(non-potable water|do not litter|smoking) symbol",
    "disc": (
        f"large ({_COLOURS}) circle|medium (black|white) circle|heavy large circle|radio button"
    ),
    "square": (
        f"large ({_COLOURS}) square|(black|white) (large|medium|medium small|small) square|"
        "(black|white) square button"
    ),
    "diamond": "(large|small) (orange|blue) diamond",
    "triangle": "(up|down)-pointing red triangle",
    "heart": f"({_COLOURS}) heart|heavy black heart|black heart suit",
    "book": "(closed|green|blue|orange) book",
    "mailbox": "(open|closed) mailbox .*",
    "banknote": "banknote .*",
    "globe": "earth globe .*",
    "medal": "((first|second|third) place|sports) medal",
    "cat face": ".*cat face.*",
    "speaker": "speaker.*",
    "phone": "mobile phone.*|vibration mode",
    "magnifying glass": ".*magnifying glass",
    "lock": "lock|open lock|closed lock with key",
    "tray": "(in|out)box tray",
    "snowman": "snowman.*",
    "mark": "(black|white) (question|exclamation) mark ornament|heavy exclamation mark symbol",
    "calculation": "heavy (plus|minus|division|equals) sign|heavy multiplication x|cross mark",
    "sun behind cloud": ".*sun (behind|with small) cloud.*|cloud( with .*)?|thunder cloud and rain",
}
"""Regular expression of the full names of each family."""

_PATTERNS = {family: re.compile(pattern) for family, pattern in FAMILIES.items()}


def family_of(name: str) -> str | None:
    """Family of an emoji by its lower-case Unicode name; None if it stands alone."""
    return next((family for family, names in _PATTERNS.items() if names.fullmatch(name)), None)


FONT_NAME = "NotoColorEmoji.ttf"
"""File to look for if no path is given."""

_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_INSTALL = "install it with `apt install fonts-noto-color-emoji`, or give one with --path FONT"
_JOINER = 0x200D
_MODIFIERS = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium-light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium-dark skin tone",
    0x1F3FF: "dark skin tone",
    0x2640: "female",
    0x2642: "male",
}
"""Caption words by Unicode short name (CLDR)."""
_REGIONAL = range(0x1F1E6, 0x1F200)  # letters that make flags in pairs
_DAMAGE = (TTLibError, struct.error, AssertionError, LookupError, ValueError, EOFError)


class Emoji:
    """Emoji of a font with colour bitmaps (tables CBDT and CBLC), on white squares.

    Captions are lower-case Unicode names; newer Pythons know more of them. Parts of sequences
    (digits, flag letters, skin-tone samples, the empty keycap) are left out. Pictures of one design
    (clocks, arrows, ...) are a family. ``variants`` adds sequences with a skin tone, a gender sign
    or both ("runner, dark skin tone, female"), in the group of their emoji.
    """

    class_names: list[str] | None = None

    def __init__(self, font: Path | None = None, variants: bool = False) -> None:
        self.font = _find(font)
        self._variants = variants
        try:
            table = TTFont(self.font)
            codes: Mapping[int, str] = table.getBestCmap() or {}
            self._bitmaps = _largest_strike(table)
            self.licence = _licence(table)
            sequences = _sequences(table, codes) if variants else {}
        except _DAMAGE as error:
            raise ValueError(f"{self.font}: not a font that can be read, or damaged") from error
        if not self._bitmaps:
            raise ValueError(
                f"{self.font}: this font has no colour bitmaps (table CBDT); {_INSTALL}"
            )
        self._glyphs: dict[tuple[int, ...], str] = {}
        for code, glyph in sorted(codes.items()):
            if glyph in self._bitmaps and _is_emoji(code):
                self._glyphs[(code,)] = glyph
                for modifiers, variant in sequences.get(code, []):
                    if variant in self._bitmaps:
                        sequence = (code, *modifiers)
                        self._glyphs[sequence] = variant
        count = len(self._glyphs)
        if not count:
            raise ValueError(f"{self.font}: none of its colour bitmaps is an emoji with a name")
        self.size = (count, self.font.stat().st_size)
        self.files: Sequence[Path] = (self.font,)
        self.left_out = LeftOut()
        self.default_sizes = _sizes(count, variants)

    def images(self, skipped: Skipped | None) -> Iterator[SourceImage]:
        """See :class:`memfree.data.sources.Source`; (3, S, S), S the longer side of the bitmap."""
        for codes, glyph in self._glyphs.items():
            key = f"emoji-{codes[0]:x}"
            name = "-".join([key, *(f"{code:x}" for code in codes[1:])])
            base = unicodedata.name(chr(codes[0])).lower()
            words = [base, *(_MODIFIERS[code] for code in codes[1:])]
            group = key if self._variants else None
            caption, family = ", ".join(words), family_of(base)
            with skipping(skipped, ValueError):
                pixels = _on_white(_png(self._bitmaps[glyph], name), name)
                yield SourceImage(name, pixels, caption=caption, group=group, family=family)


def _sizes(count: int, variants: bool) -> tuple[float, float, float, float]:
    """Calibration has 500, enough for a threshold at a false-positive rate of 1 %."""
    if count < 1300:
        return SHARES
    if variants:
        return (count - 900.0, 500.0, 250.0, 150.0)
    return (500.0, 500.0, 250.0, count - 1250.0)


def _find(font: Path | None) -> Path:
    if font is not None:
        if not font.is_file():
            raise FileNotFoundError(f"--path: no font at {font}; {_INSTALL}")
        return font
    for folder in _FOLDERS:
        for file in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return file
    raise FileNotFoundError(f"--source emoji: no {FONT_NAME} in {', '.join(_FOLDERS)}; {_INSTALL}")


def _is_emoji(code: int) -> bool:
    if code < 0x80 or code in _REGIONAL or not unicodedata.name(chr(code), ""):
        return False
    return unicodedata.category(chr(code)) not in ("Me", "Sk")  # keycap, skin tones


def _largest_strike(table: TTFont) -> Mapping[str, Any]:
    if "CBDT" not in table or "CBLC" not in table:
        return {}
    sizes = [strike.bitmapSizeTable.ppemY for strike in table["CBLC"].strikes]
    strikes: list[Mapping[str, Any]] = table["CBDT"].strikeData
    return strikes[sizes.index(max(sizes))] if sizes else {}


def _sequences(
    table: TTFont, codes: Mapping[int, str]
) -> dict[int, list[tuple[tuple[int, ...], str]]]:
    """(modifiers, glyph) by base; skips right-to-left ligatures, which begin with a modifier."""
    sequences: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    if "GSUB" not in table or table["GSUB"].table.LookupList is None:
        return sequences
    code_of = {glyph: code for code, glyph in codes.items()}
    for lookup in table["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            subtable = getattr(subtable, "ExtSubTable", subtable)
            for first, ligatures in getattr(subtable, "ligatures", {}).items():
                base = code_of.get(first)
                if base is None or base in _MODIFIERS:
                    continue
                for ligature in ligatures:
                    after = [code_of.get(glyph) for glyph in ligature.Component]
                    modifiers = tuple(code for code in after if code in _MODIFIERS)
                    if modifiers and all(code in _MODIFIERS or code == _JOINER for code in after):
                        sequences.setdefault(base, []).append((modifiers, ligature.LigGlyph))
    return {base: sorted(variants) for base, variants in sequences.items()}


def _png(bitmap: Any, name: str) -> bytes:
    try:
        data = bitmap.imageData
    except (AttributeError, *_DAMAGE) as error:
        raise ValueError(f"{name}: its bitmap in the font is not a PNG, or damaged") from error
    return bytes(data)


def _on_white(data: bytes, name: str) -> np.ndarray:
    picture = open_image(data, name).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return to_array(square.convert("RGB"))


def _licence(table: TTFont) -> str:
    names = table.get("name")
    family, version, owner, terms = (
        " ".join((names.getDebugName(number) or "").split()) if names is not None else ""
        for number in (1, 5, 0, 13)
    )
    if "Open Font License, Version 1.1" in terms:
        terms = "OFL-1.1 (SIL Open Font License)"
    about = ", ".join(text for text in (family, version, owner) if text)
    return f"{terms or 'not stated'}; font {about}" if about else terms or "not stated"
