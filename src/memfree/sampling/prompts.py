"""What a text-to-image run is asked for: a file of prompts, or captions of a dataset folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from memfree.data import DatasetFolder
from memfree.data.prompts import PromptSet, prompt_set, read_prompts
from memfree.models import LoadedModel


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


def prompts_in_turn(prompts: PromptOptions, model: LoadedModel) -> list[str] | None:
    """The prompts to take in turn; None for a pixel model."""
    given = prompts.file is not None or prompts.dataset is not None
    if model.pipe is None:
        if given:
            raise ValueError("--prompts needs a text-to-image model; this one takes no text")
        return None
    if prompts.file is not None and prompts.dataset is not None:
        raise ValueError("give --prompts.file or --prompts.dataset, not both")
    if prompts.file is not None:
        with _named("--prompts.file"):
            return read_prompts(prompts.file)
    if prompts.dataset is not None:
        with _named("--prompts.dataset"):
            data = DatasetFolder(prompts.dataset)
            return prompt_set(data, prompts.captions, int(prompts.least_records))
    raise ValueError("a text-to-image model needs --prompts.file, or --prompts.dataset")


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Put the option before what is wrong with its value."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error
