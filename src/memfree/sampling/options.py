"""Options of sampling: no torch here, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from memfree.data.options import PromptSet

SchedulerName = Literal["ddpm", "ddim", "dpmsolver++", "dpmsolver++-karras", "euler", "unipc"]


@dataclass
class PromptOptions:
    """What a text-to-image model is asked for; sample i takes prompt i, and they repeat in turn."""

    file: Path | None = None
    """Text file with one prompt a line."""
    dataset: Path | None = None
    """Captioned dataset folder to take prompts from."""
    captions: PromptSet = "duplicated"
    """Which captions of it: of repeated training images, of the other training images, or of the
    test part."""
    least_records: PositiveInt = 2
    """Training records from which on an image counts as repeated."""
