"""Guidances as a mitigation."""

from __future__ import annotations

from collections.abc import Sequence

from memfree.guidance.mitigation import Mitigation
from memfree.guidance.prediction import Guidance


class Guided(Mitigation):
    """Changes predictions alone: AMG, multiplicity guidance, both, or an observer.

    Args:
        guidances: in order.
    """

    def __init__(self, guidances: Sequence[Guidance]) -> None:
        self._guidances = list(guidances)

    def guidances(self) -> list[Guidance]:
        """Those that were given."""
        return list(self._guidances)
