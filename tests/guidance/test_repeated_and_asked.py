"""Which records of a repeated image count for a prompt, and what AMG remembers of the image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from amg_steps import ANY, make_images, prediction_near

from memfree.conditions import TextConditions
from memfree.guidance import ConstantThreshold, NormalizedL2, SteadyAMG
from memfree.guidance.amg_extensions import AskedRecords, Call, nearest_call
from memfree.guidance.similarity import Match
from memfree.retrieval import ReferenceIndex

ANGLES = {"red apple": 0.0, "green apple": 0.6, "postbox": 1.4, "fruit": 0.3, "unseen": 1.2}
# Image 5 has 64 records under two captions; 9 and 10 are near copies under one each.
CAPTIONS = {5: "red apple", 9: "green apple", 10: "postbox"}


def encode(texts):
    """Token vectors whose mean has the angle of ANGLES."""
    vectors = torch.tensor([[np.cos(ANGLES[text]), np.sin(ANGLES[text])] for text in texts])
    return TextConditions(vectors.float()[:, None].expand(-1, 3, -1))


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def index(images):
    counts, groups = torch.ones(80, dtype=torch.int64), torch.arange(80)
    counts[5], groups[10] = 60, 9
    captions = [CAPTIONS.get(i, "unseen") for i in range(80)]
    index = ReferenceIndex.build(images, captions=captions, counts=counts, groups=groups)
    return index.add(images[5:6], captions=["fruit"], counts=torch.tensor([4]))


def asked(index, images, prompts, rows, bandwidth):
    _, plain = prediction_near(images, rows)
    plain = replace(plain, conditions=encode(prompts), encode=encode)
    match = NormalizedL2()(index, plain.clean_estimate())
    assert match.rows[:, 0].tolist() == rows
    return AskedRecords(index, bandwidth)(
        plain, match, torch.ones(len(rows), dtype=torch.bool)
    ).tolist()


@pytest.mark.parametrize("bandwidth", [0.0, 0.3])
def test_records_count_by_their_captions(index, images, bandwidth):
    prompts, rows = ["red apple", "fruit", "postbox", "postbox", "unseen"], [5, 5, 5, 10, 17]
    counts = {5: {"red apple": 60, "fruit": 4}, 10: {"green apple": 1, "postbox": 1}}
    expected = []
    for prompt, row in zip(prompts, rows, strict=True):
        total = 0.0
        for caption, count in counts.get(row, {"unseen": 1}).items():
            cosine = np.cos(ANGLES[prompt] - ANGLES[caption])
            near = np.exp((cosine - 1) / bandwidth) if bandwidth else 0.0
            total += count * (1.0 if caption == prompt else near)
        expected.append(max(total, 1.0))
    found = asked(index, images, prompts, rows, bandwidth)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_half_precision_outside_does_not_reach_the_captions(index, images):
    expected = asked(index, images, ["fruit"], [5], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert asked(index, images, ["fruit"], [5], 0.3) == expected


def test_without_a_bandwidth_all_records_count(index, images):
    assert asked(index, images, ["postbox", "unseen"], [5, 9], None) == [64.0, 2.0]


def test_records_without_a_caption_count_for_every_prompt(images):
    counts = torch.ones(80, dtype=torch.int64)
    counts[5] = 8
    captions = [None if i == 5 else "unseen" for i in range(80)]
    index = ReferenceIndex.build(images, captions=captions, counts=counts)
    assert asked(index, images, ["postbox"], [5], 0.0) == [8.0]


def test_a_negative_bandwidth_is_refused(index):
    with pytest.raises(ValueError, match="caption_bandwidth must be at least 0"):
        AskedRecords(index, -0.1)


def test_a_repeated_image_calls_only_samples_that_are_asked_for_it(index, images):
    """Another prompt has the plain margin, and keeps the paper's least scale of 1."""
    _, plain = prediction_near(images, [5, 5])
    plain = replace(plain, conditions=encode(["red apple", "unseen"]), encode=encode)
    settings = {"c1": 1e6, "least_scale": 0.0, "latched": True}
    amg = SteadyAMG(index, NormalizedL2(), ANY, **settings, caption_bandwidth=0.0)
    guided = amg(plain)
    assert guided.trace["s1"].tolist() == [3.0, 2.0]
    _, far = prediction_near(images, [-1, -1])
    far = replace(far, conditions=plain.conditions, encode=encode, memory=plain.memory, step=1)
    assert amg(far).active.tolist() == [True, False]

    sigma = NormalizedL2()(index, plain.clean_estimate()).sigma
    gate = ConstantThreshold(float(sigma.max()) + 0.3)
    amg = SteadyAMG(
        index, NormalizedL2(), gate, c3=1.0, margin_per_doubling=0.1, caption_bandwidth=0.0
    )
    assert amg(replace(plain, memory={})).active.tolist() == [True, False]


def test_a_latched_sample_keeps_the_caption_that_it_left(index, images):
    """G_dup of a held sample is away from the caption of the image at its highest σ (eq. 16)."""
    encoded = []

    def denoise(x_t, conditions):
        if conditions is not None:
            encoded.append(conditions)
        return 0.3 * x_t

    _, near = prediction_near(images, [5])
    _, far = prediction_near(images, [17], distance=0.4)
    sigma = [float(NormalizedL2()(index, one.clean_estimate()).sigma) for one in (near, far)]
    assert sigma[0] > sigma[1]
    asked_for = {"conditions": encode(["fruit"]), "encode": encode, "denoise": denoise}
    near, far = replace(near, **asked_for), replace(far, **asked_for, step=1, memory=near.memory)
    amg = SteadyAMG(index, NormalizedL2(), ConstantThreshold(sigma[0] - 0.01), c2=1e6, latched=True)
    for step in (near, far):
        encoded.clear()
        amg(step)
        assert [one.embeddings[0].tolist() for one in encoded] == [
            encode(["red apple"]).embeddings[0].tolist()
        ]


def test_a_call_is_the_match_at_the_highest_sigma_of_the_called(images):
    _, plain = prediction_near(images, [5, 5, 5])

    def at(sigma, rows):
        rows = torch.tensor(rows)[:, None]
        return Match(torch.tensor(sigma), rows, rows.float())

    steps = [
        ([0.1, 0.5, 0.9], [1, 1, 1], [False, True, True]),
        ([0.3, 0.7, 0.2], [2, 2, 2], [True, False, True]),
        ([0.2, 0.6, 0.95], [3, 3, 3], [True, True, True]),
    ]
    for sigma, rows, called in steps:
        now = Call(at(sigma, rows), torch.tensor(rows) * 10.0)
        call = nearest_call(plain, "me", now, torch.tensor(called))
    torch.testing.assert_close(call.match.sigma, torch.tensor([0.3, 0.6, 0.95]))
    assert call.match.rows[:, 0].tolist() == call.match.vectors[:, 0].tolist() == [2, 3, 3]
    assert call.records.tolist() == [20.0, 30.0, 30.0]


def test_prompts_are_compared_only_where_the_gate_may_open(index, images):
    """Captions are encoded once, and not for a sample that is far from every image."""
    encoded = []

    def counting(texts):
        encoded.extend(texts)
        return encode(texts)

    _, plain = prediction_near(images, [5, -1])
    plain = replace(plain, conditions=encode(["red apple", "red apple"]), encode=counting)
    amg = SteadyAMG(
        index, NormalizedL2(), ANY, c3=1.0, margin_per_doubling=0.01, caption_bandwidth=0.3
    )
    for _ in range(2):
        amg(replace(plain, memory={}))
    assert sorted(encoded) == ["fruit", "red apple"]


def test_an_encoder_of_another_thread_leaves_this_ones_captions(index, images):
    """It asks while the first one encodes; its captions mean something else."""
    _, plain = prediction_near(images, [5])
    records = AskedRecords(index, 0.3)

    def asking(encoder):
        one = replace(plain, conditions=encode(["fruit"]), encode=encoder, memory={})
        match = NormalizedL2()(index, one.clean_estimate())
        return records(one, match, torch.ones(1, dtype=torch.bool)).tolist()

    def other(texts):
        asking(encode)
        return encode(["unseen"] * len(texts))

    expected = asked(index, images, ["fruit"], [5], 0.3)
    assert asking(other) != expected
    assert asking(encode) == expected
