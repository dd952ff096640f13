"""What a text-to-image run is asked for: a file of prompts, or captions of a dataset folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memfree.sampling.options import PromptOptions

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.models import LoadedModel


def prompts_in_turn(prompts: PromptOptions, model: LoadedModel) -> list[str] | None:
    """The prompts to take in turn; None for a pixel model."""
    from memfree.data import DatasetFolder
    from memfree.data.prompts import prompt_set, read_prompts

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
