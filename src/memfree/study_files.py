"""Which of the two kinds of study a file is of: each is refused by the other's command, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memfree.untrusted_yaml import check_yaml, config_files

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
    for file in config_files(words):
        keys = _keys(Path(file))
        if keys & OWN[other] and not keys & OWN[command]:
            raise ValueError(
                f"{file} is of the other kind of study: memfree {other} --config {file}"
            )


def _keys(path: Path) -> set[str]:
    """Options at the top of a YAML file; none where it cannot be read, which the parser reports."""
    import yaml  # `memfree --help` should not wait for it

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        found = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return set()
    return {str(key) for key in found} if isinstance(found, dict) else set()
