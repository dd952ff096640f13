"""Emoji that differ by a detail of one design, such as the hand of a clock, by their names."""

from __future__ import annotations

import re

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
"""Regular expression of the whole names of each family."""

_PATTERNS = {family: re.compile(pattern) for family, pattern in FAMILIES.items()}


def family_of(name: str) -> str | None:
    """The family of an emoji with this Unicode name in lower case, None if it stands alone."""
    return next((family for family, one in _PATTERNS.items() if one.fullmatch(name)), None)
