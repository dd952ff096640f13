"""Lightning's Trainer, with a refusal of its options as one line that names them."""

from __future__ import annotations

import re
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

_DEVICES = {
    "accelerator": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
}
"""Arguments of the Trainer that are options ``--trainer.*`` of a command, and their defaults."""
_SENTENCE_WITH_ADDRESS = re.compile(r"[^.]*https?://\S*")


def build_trainer(**options: Any) -> Trainer:
    """Make a Trainer; call it before anything is written, as it refuses what is not there.

    Args:
        options: arguments of the Trainer.

    Raises:
        ValueError: there is no such device or strategy here; names the options that were given.
    """
    try:
        return Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        given = [
            f"--trainer.{name} {options[name]}"
            for name, default in _DEVICES.items()
            if options.get(name, default) != default
        ]
        raise ValueError(f"{' '.join(given)}: {first_line(error)}".removeprefix(": ")) from error


def first_line(error: Exception) -> str:
    """The first line of a message of Lightning's, without addresses and code marks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _SENTENCE_WITH_ADDRESS.sub("", lines[0]).replace("`", "").strip()
