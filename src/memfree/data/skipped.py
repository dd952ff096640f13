"""Skipped records and shards: counted, named, and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from memfree.console import counted, shown
from memfree.folders.untrusted import short

INCOMPLETE = 3
"""Exit status of a command that finished but skipped pictures or shards."""
_MESSAGES = 20
_NAMED = 3  # of them are in a summary


def _append(messages: list[str], message: str) -> None:
    if len(messages) < _MESSAGES and message not in messages:
        messages.append(message)


@dataclass
class Skipped:
    """Broken records and shards; how many records a damaged shard has lost is unknown."""

    records: int = 0
    """Broken records, counted each time they are met."""
    kept: int = 0
    """Used records, counted each time they are met."""
    shards: set[str] = field(default_factory=set)
    """Missing or damaged shards."""
    messages: list[str] = field(default_factory=list)

    def record(self, message: str) -> None:
        """Count one broken record."""
        self.records += 1
        _append(self.messages, shown(message))  # names of files are in it

    def shard(self, name: str, message: str) -> None:
        """Add a missing or damaged shard, once per name."""
        self.shards.add(name)
        _append(self.messages, shown(message))

    def add(self, other: Skipped) -> None:
        """Add all of another report."""
        self.records += other.records
        self.kept += other.kept
        self.shards |= other.shards
        for message in other.messages:
            _append(self.messages, message)

    def take(self) -> Skipped:
        """What was added since the last call."""
        taken = Skipped(self.records, self.kept, self.shards, self.messages)
        self.records, self.kept, self.shards, self.messages = 0, 0, set(), []
        return taken

    def counts(self) -> dict[str, Any]:
        """Counts, and names of shards, as JSON."""
        return {"records": self.records, "kept": self.kept, "shards": sorted(self.shards)}

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> Skipped:
        """Inverse of :meth:`counts`."""
        return cls(counts["records"], counts["kept"], set(counts["shards"]))

    def __bool__(self) -> bool:
        return bool(self.records or self.shards)

    def named(self) -> str:
        """The first three reasons, on one line."""
        more = "; ..." if len(self.messages) > _NAMED else ""
        return short("; ".join(self.messages[:_NAMED]), 1000) + more

    def text(self, noun: str = "record") -> str:
        """Such as ``661 of 1508 records skipped, 2 shards damaged or missing``; empty if none."""
        parts = []
        if self.records:
            parts.append(f"{self.records} of {counted(self.records + self.kept, noun)} skipped")
        if self.shards:
            parts.append(f"{counted(len(self.shards), 'shard')} damaged or missing")
        return ", ".join(parts)


@contextmanager
def skipping(skipped: Skipped | None, *errors: type[Exception]) -> Iterator[None]:
    """Count these errors as a broken record; without ``skipped``, raise them."""
    try:
        yield
    except errors as error:
        if skipped is None:
            raise
        skipped.record(str(error))


@dataclass
class LeftOut:
    """Unused files that are not broken, by folder or shard; one read again counts once."""

    places: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    def at(self, place: str) -> Callable[[str], None]:
        """Function that receives the names left out in one reading of ``place``."""
        number = 0

        def note(what: str) -> None:
            nonlocal number
            number += 1
            self.places[place] = max(self.places.get(place, 0), number)
            _append(self.first, short(what))

        return note

    @property
    def count(self) -> int:
        """Number of things left out."""
        return sum(self.places.values())

    def add(self, other: LeftOut) -> None:
        """Add another report; what both met counts once."""
        for place, number in other.places.items():
            self.places[place] = max(self.places.get(place, 0), number)
        for what in other.first:
            _append(self.first, what)

    def take(self) -> LeftOut:
        """What was added or increased since the last call."""
        taken = LeftOut(self.places, self.first)
        self.places, self.first = {}, []
        return taken

    def counts(self) -> dict[str, Any]:
        """Number and first names, as JSON."""
        return {"count": self.count, "first": list(self.first)}

    def text(self) -> str:
        """Such as ``left out: 12 (notes.md; a.gif; b.gif; ...)``; empty if none."""
        if not self.places:
            return ""
        more = "; ..." if self.count > min(_NAMED, len(self.first)) else ""
        return f"left out: {self.count} ({'; '.join(self.first[:_NAMED])}{more})"

    def __bool__(self) -> bool:
        return bool(self.places)
