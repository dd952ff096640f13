"""Studies: models sampled in many ways, over several training seeds."""

from typing import Any

from memfree import with_moved_names


def _absent(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__getattr__ = with_moved_names(
    __name__,
    _absent,
    {
        "study": "memfree.commands.study",
        "text_study": "memfree.commands.text_study",
    },
)
