"""The ways to sample that a text study compares, as they are given, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Subjects = dict[str, dict[str, Any]]
"""Options of sample.py below --guidance by subject, as {"wen_5": {"mitigation": "wen", ...}}."""
AT_MOST = "at_most"
"""Option of a subject that is none of sampling: draw no more than so many samples of it."""
_NAME = re.compile(r"[\w-]+")


def check_study(name: str, subjects: Subjects, prompt_sets: Sequence[str], oracle: bool) -> None:
    """Refuse what cannot be studied; what sample.py takes, ``Stage.check`` asks sample.py.

    Raises:
        ValueError: names the option.
    """
    from memfree.study.text_results import ORACLE

    for option, names in (("name", [name]), ("subjects", [*subjects])):
        for one in names:
            if not _NAME.fullmatch(one):
                raise ValueError(f"--{option}: use letters, digits, - and _ for the name {one!r}")
    if not subjects:
        raise ValueError("--subjects is empty: name at least one way to sample")
    if oracle and ORACLE in subjects:
        raise ValueError(f"--subjects: {ORACLE} is the model without repetitions; choose a name")
    if not prompt_sets:
        raise ValueError("--prompt_sets is empty: name at least one, such as duplicated")
    for subject, options in subjects.items():
        most = options.get(AT_MOST, 1)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(
                f"--subjects.{subject}.{AT_MOST} must be a whole number above 0, not {most!r}"
            )
