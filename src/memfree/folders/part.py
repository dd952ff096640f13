"""A part of what a command does, as ``3/8``: several processes or jobs fill one folder together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Items = TypeVar("Items", bound=Sequence[Any])
ALL = "all"
_PART = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Part:
    """One of several disjoint parts that together are the whole."""

    number: int = 1
    """From 1."""
    of: int = 1
    """How many parts there are."""

    def __str__(self) -> str:
        return ALL if self.whole else f"{self.number}/{self.of}"

    @property
    def whole(self) -> bool:
        """Whether there is nothing beside it."""
        return self.of == 1

    def share(self, items: Items) -> Items:
        """The items of this part: of eight parts, the third has items 3, 11, 19, ..."""
        return items[self.number - 1 :: self.of]  # type: ignore[return-value]


WHOLE = Part()


def part_of(text: str) -> Part:
    """What ``--part`` says: ``all``, or the number of a part and how many there are.

    Raises:
        ValueError: it says something else.
    """
    found = _PART.fullmatch(text)
    if text == ALL:
        return WHOLE
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part {text}: say all, or a part such as 3/8 (1/8 to 8/8)")
    return Part(int(found[1]), int(found[2]))
