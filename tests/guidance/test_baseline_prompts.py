"""RT, RNA, CWR, GNI and lower guidance: what they draw, from where, and what they leave."""

from collections import Counter

import pytest
import torch
from tiny_text_model import generators, rows_of, start_of

from memfree.guidance.baselines import (
    EmbeddingNoise,
    EmbeddingNoiseOptions,
    Insertion,
    LowerGuidance,
    LowerGuidanceOptions,
    RandomNumbers,
    RandomTokens,
    RepeatedWords,
)

WORDS = ["alpha", "beta", "gamma"]
PROMPTS = ["a red cat", "dog", "two small green birds", ""]
METHODS = {
    "rt": lambda n: RandomTokens(WORDS, Insertion(n)),
    "rna": lambda n: RandomNumbers(Insertion(n)),
    "cwr": lambda n: RepeatedWords(Insertion(n)),
}


@pytest.mark.parametrize("name", METHODS)
def test_prompts_keep_their_words_in_order_and_gain_what_is_asked_for(name):
    changed = METHODS[name](3).prompts(PROMPTS, generators(4))
    for prompt, new in zip(PROMPTS, changed, strict=True):
        words, left = new.split(" "), prompt.split(" ")
        if name == "cwr" and not prompt:
            assert new == ""
            continue
        assert len(words) == len(left) + 3
        added = list((Counter(words) - Counter(left)).elements())
        assert len(added) == 3
        walk = iter(words)
        assert all(word in walk for word in left)  # in order
        if name == "rt":
            assert set(added) <= set(WORDS)
        elif name == "rna":
            assert all(word.isdigit() and int(word) < 100_000 for word in added)
        else:
            assert set(added) <= set(left)


@pytest.mark.parametrize("name", METHODS)
def test_prompts_of_a_batch_are_independent_and_repeatable(name):
    method = METHODS[name](4)
    together = method.prompts(PROMPTS, generators(4))
    assert together == method.prompts(PROMPTS, generators(4))
    alone = [
        method.prompts([prompt], [one])[0]
        for prompt, one in zip(PROMPTS, generators(4), strict=True)
    ]
    assert alone == together
    assert together != method.prompts(PROMPTS, generators(4, seed=99))
    assert METHODS[name](0).prompts(PROMPTS, generators(4)) == PROMPTS


def test_every_place_and_every_word_is_as_likely():
    method, source = RandomTokens(lambda: WORDS, Insertion(1)), torch.Generator().manual_seed(0)
    made = method.prompts(["x y"] * 1800, [source] * 1800)
    counts = Counter(made)
    assert len(counts) == 9  # three places, three words
    assert all(140 < count < 260 for count in counts.values())


def test_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        RandomTokens([]).prompts(PROMPTS, generators(4))


@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_noise_on_the_embedding_is_that_of_each_samples_generator(strength):
    start = start_of(None)
    method = EmbeddingNoise(EmbeddingNoiseOptions(strength))
    new = method.embedding(start)
    for row, generator in enumerate(generators(4)):
        noise = torch.randn(7, 12, generator=generator)
        expected = start.conditions.embeddings[row] + strength * noise
        assert torch.equal(new.embeddings[row], expected)
    assert torch.equal(
        method.embedding(rows_of(start, slice(2, 3))).embeddings, new.embeddings[2:3]
    )
    assert EmbeddingNoise(EmbeddingNoiseOptions(0)).embedding(start) is start.conditions


def test_lower_guidance_lowers_and_never_raises():
    method = LowerGuidance(LowerGuidanceOptions(3.0))
    assert [method.guidance_scale(s) for s in (7.5, 3.0, 1.5)] == [3.0, 3.0, 1.5]
