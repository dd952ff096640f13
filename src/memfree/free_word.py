"""The one word of a command line that is no option, as in ``memfree audit IMAGES --index I``."""

from __future__ import annotations

from collections.abc import Sequence


def as_options(words: Sequence[str], option: str | None) -> list[str]:
    """The words with the free one, the first or the last, as a value of ``option``.

    It goes to the front, wherever it stood: of a file with options and an option beside it, the
    option wins. A last word is free where the one before it is no option that waits for a value.

    Args:
        words: of the command line, without the program's name and the command.
        option: what the free word stands for, without dashes; None where a command has none.
    """
    given = list(words)
    if option is None or not given:
        return given
    if not given[0].startswith("-"):
        return [f"--{option}={given[0]}", *given[1:]]
    waits = given[-2].startswith("-") and "=" not in given[-2] if len(given) > 1 else True
    if given[-1].startswith("-") or waits:
        return given
    return [f"--{option}={given[-1]}", *given[:-1]]
