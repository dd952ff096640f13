"""Random streams: the numbers of today, one use a number, and none beside them."""

import ast
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from memfree.data import random_streams
from memfree.data.random_streams import (
    EvaluationStream,
    GuardStream,
    Stream,
    autoencoder_step_generator,
    buffer_random,
    generator_of,
    step_generator,
    step_seed,
    torch_generator,
)

SOURCE = Path(__file__).parents[2] / "src" / "memfree"
NUMBERS = {
    Stream: {
        "DISTINCT_IMAGES": 0,
        "SPLIT": 1,
        "REPEATED_IMAGES": 2,
        "COPY": 3,
        "SOURCE_ORDER": 4,
        "RECORD_ORDER": 5,
        "CONDITIONS": 6,
        "EPOCH": 7,
        "FLIPS": 8,
        "STREAMED_FLIPS": 9,
        "SHARDS": 10,
        "WORD": 11,
        "LABELS": 12,
        "LIMIT": 13,
        "VALIDATION": 14,
    },
    EvaluationStream: {"ROWS": 0, "SUBSETS": 1, "SUBSAMPLES": 2, "SHUFFLED_CAPTIONS": 3},
    GuardStream: {"REDRAW": 0, "MITIGATION": 1},
}
WORDS = {
    "SPLIT": "seed Stream.SPLIT",
    "REPEATED_IMAGES": "self.seed Stream.REPEATED_IMAGES",
    "COPY": "self.seed Stream.COPY image number",
    "SOURCE_ORDER": "seed Stream.SOURCE_ORDER",
    "RECORD_ORDER": "seed plan.seed Stream.RECORD_ORDER",
    "CONDITIONS": "plan.seed Stream.CONDITIONS",
    "EPOCH": "seed epoch Stream.EPOCH",
    "FLIPS": "seed epoch Stream.FLIPS",
    "STREAMED_FLIPS": "self._options.seed epoch unit Stream.STREAMED_FLIPS",
    "SHARDS": "self._options.seed epoch turn Stream.SHARDS",
    "WORD": "self.seed Stream.WORD image attempt",
    "LABELS": "seed Stream.LABELS",
    "LIMIT": "seed Stream.LIMIT",
    "VALIDATION": "number Stream.VALIDATION",
    "DISTINCT_IMAGES": "self._seed Stream.DISTINCT_IMAGES",
    "ROWS": "seed EvaluationStream.ROWS",
    "SUBSETS": "seed EvaluationStream.SUBSETS",
    "SUBSAMPLES": "seed EvaluationStream.SUBSAMPLES",
    "SHUFFLED_CAPTIONS": "seed EvaluationStream.SHUFFLED_CAPTIONS",
}
"""The place of each stream among the numbers of its generator, which results depend on too."""

STEP, FIRST = 2832498209212341122, 11425928242767342472
"""Of the numbers 3, 1, 4, 1, and of 3, 1."""


def calls():
    """All calls in the package: file, name of the function, the call."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func).rsplit(".", 1)[-1], node


@pytest.mark.parametrize("streams", NUMBERS, ids=lambda streams: streams.__name__)
def test_the_numbers_are_those_of_today(streams):
    # Members of equal numbers would be one under two names, which __members__ lists.
    assert {name: int(one) for name, one in streams.__members__.items()} == NUMBERS[streams]
    assert len(list(streams)) == len(NUMBERS[streams])


def test_each_stream_has_one_use_and_its_place():
    uses = {}
    for _, name, call in calls():
        if name == "generator_of":
            words = " ".join(ast.unparse(word) for word in call.args)
            streams = [word for word in words.split() if "Stream." in word]
            uses.setdefault(streams[0].split(".")[1] if streams else "none", []).append(words)
    # Of an evaluation: resampled and rate_ratio, which have no number.
    assert uses.pop("none") == ["seed", "seed"]
    assert uses == {name: [words] for name, words in WORDS.items()}
    guarded = Counter(
        ast.unparse(word)
        for _, name, call in calls()
        if name == "sources"
        for word in call.args
        if "Stream." in ast.unparse(word)
    )
    assert guarded == {"GuardStream.REDRAW": 1, "GuardStream.MITIGATION": 1}


def test_nobody_seeds_a_generator_by_other_numbers():
    makers = {"PCG64", "SeedSequence", "default_rng", "Random", "RandomState", "Philox", "MT19937"}
    found = {path for path, name, _ in calls() if name in makers}
    assert found == {Path(random_streams.__file__)}
    # torch's are seeded by a seed alone, or by what this module has made of several numbers.
    sums = [
        f"{path.name}: {ast.unparse(call)}"
        for path, name, call in calls()
        if name == "manual_seed"
        and path != Path(random_streams.__file__)
        and any(isinstance(part, ast.BinOp) for part in ast.walk(call.args[0]))
    ]
    assert sums == [
        "small_clip.py: torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))"
    ]  # drawn, with a bound


@pytest.mark.parametrize("words", [(5,), (5, 0), (5, 3), (2**40, 7, 8), (0, 3, 12, 1)])
def test_generators_are_those_of_numpy(words):
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(words))))
    assert generator_of(*words).random(5).tolist() == expected.random(5).tolist()
    assert np.random.default_rng(list(words)).random() == generator_of(*words).random()


def test_a_seed_without_a_number_is_numpys_own():
    drawn = np.random.default_rng(5).random(3).tolist()
    assert generator_of(5).random(3).tolist() == drawn
    assert generator_of(5, EvaluationStream.ROWS).random(3).tolist() == drawn  # as it says there


def test_numbers_of_torch_are_those_of_today():
    assert step_seed(3, 1, 4, 1) == STEP
    assert torch_generator(3, 1).initial_seed() == FIRST
    assert torch_generator(3, 1, 0, GuardStream.REDRAW).initial_seed() == FIRST
    assert step_generator(3, 1, torch.device("cpu")).initial_seed() == FIRST >> 1
    assert autoencoder_step_generator(3, 4).initial_seed() == 3_000_013
    assert buffer_random(3, 1, 4, 1).random() == random.Random("3 1 4 1").random()
