"""What is left out where broken records and shards are skipped: how much, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memfree.data.wording import counted

_MESSAGES = 20


@dataclass
class Skipped:
    """Takes what cannot be read; where there is none, the first such thing is an error.

    Shards and records are told apart: how many records a damaged shard has lost, nobody knows.
    """

    records: int = 0
    """Broken records, as often as they were met."""
    kept: int = 0
    """Records that were used, as often as they were met."""
    shards: set[str] = field(default_factory=set)
    """Shards that are missing, or damaged from some point on."""
    messages: list[str] = field(default_factory=list)
    """The first 20 different ones."""

    def record(self, message: str) -> None:
        """Take one broken record."""
        self.records += 1
        self._say(message)

    def shard(self, name: str, message: str) -> None:
        """Take a shard that is missing or damaged, however often it is met."""
        self.shards.add(name)
        self._say(message)

    def add(self, other: Skipped) -> None:
        """Take all that another one took."""
        self.records += other.records
        self.kept += other.kept
        self.shards |= other.shards
        for message in other.messages:
            self._say(message)

    def take(self) -> Skipped:
        """What came since this was last called."""
        taken = Skipped(self.records, self.kept, self.shards, self.messages)
        self.records, self.kept, self.shards, self.messages = 0, 0, set(), []
        return taken

    def counts(self) -> dict[str, Any]:
        """The numbers, and the names of shards, as JSON."""
        return {"records": self.records, "kept": self.kept, "shards": sorted(self.shards)}

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> Skipped:
        """The inverse of :meth:`counts`."""
        return cls(counts["records"], counts["kept"], set(counts["shards"]))

    def _say(self, message: str) -> None:
        if len(self.messages) < _MESSAGES and message not in self.messages:
            self.messages.append(message)

    def __bool__(self) -> bool:
        return bool(self.records or self.shards)

    def text(self, noun: str = "record") -> str:
        """Such as ``661 of 1508 records skipped, 2 shards damaged or missing``; empty for none."""
        parts = []
        if self.records:
            parts.append(f"{self.records} of {counted(self.records + self.kept, noun)} skipped")
        if self.shards:
            parts.append(f"{counted(len(self.shards), 'shard')} damaged or missing")
        return ", ".join(parts)
