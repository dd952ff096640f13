"""Which of the two kinds of study a file is of: each is refused by the other's command, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OWN = {"study": {"grids"}, "text-study": {"training", "counts", "prompt_sets"}}
"""Options that one command has and the other has not."""


def refuse_other_study(command: str, words: Sequence[str]) -> None:
    """Name the command of a file that is of the other kind of study.

    Args:
        command: the verb; nothing is refused where it is no study's.
        words: its options, ``--config FILE`` among them.

    Raises:
        ValueError: a file has options of the other command alone.
    """
    if command not in OWN:
        return
    (other,) = OWN.keys() - {command}
    pairs = zip(words, [*words[1:], ""], strict=True)
    files = [after for word, after in pairs if word == "--config"]
    files += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for file in files:
        keys = _keys(Path(file))
        if keys & OWN[other] and not keys & OWN[command]:
            raise ValueError(
                f"{file} is of the other kind of study: memfree {other} --config {file}"
            )


def _keys(path: Path) -> set[str]:
    """Options at the top of a YAML file; none where it cannot be read, which the parser reports."""
    import yaml  # `memfree --help` should not wait for it

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return set()
    return {str(key) for key in found} if isinstance(found, dict) else set()
