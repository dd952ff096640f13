"""Arguments of ``memfree.guard``, refused where they are of another kind than they should be."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

from memfree.guidance import GuidanceSettings
from memfree.guidance.mitigation import Mitigation
from memfree.guidance.settings import MitigationName
from memfree.retrieval import ReferenceIndex


def check_index(name: str, value: Any) -> None:
    """Refuse what is no index in memory.

    Raises:
        ValueError: it is a path, or something else.
    """
    if not isinstance(value, ReferenceIndex):
        raise ValueError(
            f"memfree.guard: {name} must be a ReferenceIndex, not {value!r}: give "
            "ReferenceIndex.load(folder)"
        )


def check_numbers(budget: Any, chunk_size: Any, seed: Any, false_positive_rate: Any) -> None:
    """Refuse numbers that are none, or too small.

    Raises:
        ValueError: names the argument.
    """
    whole = {"budget": (budget, 1), "seed": (seed, 0)}
    if chunk_size is not None:
        whole["chunk_size"] = (chunk_size, 1)
    for name, (value, least) in whole.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"memfree.guard: {name} must be a whole number of at least {least}, not {value!r}"
            )
    if not isinstance(false_positive_rate, Real) or not 0 < float(false_positive_rate) < 1:
        raise ValueError(
            "memfree.guard: false_positive_rate must be a number between 0 and 1, not "
            f"{false_positive_rate!r}"
        )


def check_guidance(guidance: Any, mitigation: Any) -> None:
    """Refuse what cannot guide, or is given under the other name.

    Raises:
        ValueError: names the argument, and what to give instead.
    """
    if mitigation is not None and not isinstance(mitigation, Mitigation):
        raise ValueError(
            f"memfree.guard: mitigation must be a Mitigation, not {mitigation!r}"
            f"{_instead(mitigation)}"
        )
    if isinstance(guidance, GuidanceSettings):
        if mitigation is not None:
            raise ValueError("memfree.guard: give guidance settings or a mitigation, not both")
        return
    listed = isinstance(guidance, Sequence) and not isinstance(guidance, str)
    for one in guidance if listed else [guidance]:
        if one is not None and (not callable(one) or isinstance(one, (type, Mitigation))):
            raise ValueError(
                "memfree.guard: guidance must be a guidance, a list of them, or GuidanceSettings, "
                f"not {one!r}{_instead(one)}"
            )


def _instead(value: Any) -> str:
    if isinstance(value, Mitigation):
        return ": give it as mitigation="
    if isinstance(value, type):
        return ": give an instance of it"
    if isinstance(value, str) and value in get_args(MitigationName):
        return f": give guidance=GuidanceSettings({value!r})"
    return ""
