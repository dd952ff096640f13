"""Prompts to sample from: captions of a dataset, by copies in the training set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

from memfree.data.options import PromptSet

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.data.dataset_folder import DatasetFolder

_MAX_BYTES = 64 << 20  # of a prompt file; more is not a list of prompts


def prompt_set(dataset: DatasetFolder, name: PromptSet, least_records: int = 2) -> list[str]:
    """Distinct captions of one kind, in the order of the dataset's items.

    ``duplicated``: captions of training images with ``least_records`` or more in their group
    (planned copies, and duplicates in the source); ``other``: captions of the other training
    images; ``unseen``: captions of test images that no training record has. The sets are disjoint.
    With the plan's factor as ``least_records``, small groups of near duplicates do not count.
    """
    if least_records < 2:
        raise ValueError(f"least_records {least_records}: use 2 or more")
    if name not in get_args(PromptSet):
        raise ValueError(f"{name!r} is not a prompt set; use {', '.join(get_args(PromptSet))}")
    if not dataset.manifest.get("captions"):
        raise ValueError(f"{dataset.path} has no captions; prepare captioned data")
    items = dataset.items.to_pydict()
    group_of = dict(zip(items["image_key"], items["group"], strict=True))
    conditions = dataset.conditions.to_pylist()
    trained = [row for row in conditions if row["part"] == "train"]
    records: Counter[str] = Counter()
    for row in trained:
        records[group_of[row["image_key"]]] += row["count"]
    seen = dict.fromkeys(row["caption"] for row in trained)
    repeated = dict.fromkeys(
        row["caption"] for row in trained if records[group_of[row["image_key"]]] >= least_records
    )
    tested = dict.fromkeys(row["caption"] for row in conditions if row["part"] == "test")
    prompts, empty = {
        "duplicated": (
            list(repeated),
            f"no training image has {least_records} records; "
            "prepare it with --plan.images and --plan.factor",
        ),
        "other": (
            [caption for caption in seen if caption not in repeated],
            "every training caption is one of a repeated image",
        ),
        "unseen": (
            [caption for caption in tested if caption not in seen],
            "every caption of its test part is trained on, or it has no test part",
        ),
    }[name]
    if not prompts:
        raise ValueError(f"{dataset.path} has no {name} prompts: {empty}")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one per line, stripped; empty lines are skipped."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"prompt file {path} has more than {_MAX_BYTES} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text") from error
    if "\0" in text:
        raise ValueError(f"prompt file {path} is not text, it has zero bytes")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} has no prompts; write one a line")
    return prompts
