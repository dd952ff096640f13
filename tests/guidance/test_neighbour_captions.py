"""y_N by both caption policies, against a brute-force count, and what it searches."""

import numpy as np
import pytest
import torch

from memfree.conditions import TextConditions
from memfree.guidance import (
    AntiMemorizationGuidance,
    ConstantThreshold,
    EmbeddingSimilarity,
    GuidanceSettings,
    NormalizedL2,
    Prediction,
    SteadyAMG,
    calibrate,
)
from memfree.guidance.prediction import combine
from memfree.retrieval import Features, ReferenceIndex

COUNT, ALPHA_BAR, SCALE = 40, 0.6, 3.0
CAPTIONS = [f"c{i}" for i in np.random.default_rng(0).integers(0, 6, COUNT)]
COPIES = np.random.default_rng(1).integers(1, 5, COUNT)
GROUPS = np.random.default_rng(2).integers(0, 25, COUNT)
VECTORS = {f"c{i}": [np.cos(i), np.sin(i)] for i in range(6)} | {"asked": [0.0, 2.0]}


class Directions(Features):
    """Images as vectors of length 1."""

    metric = "cosine"

    def forward(self, images):
        return torch.nn.functional.normalize(images.float().flatten(1), dim=1)

    def describe(self):
        return {"name": "directions", "metric": "cosine"}


def encode(texts):
    return TextConditions(torch.tensor([[VECTORS[text]] for text in texts], dtype=torch.float32))


def denoise(x_t, conditions):
    if conditions is None:
        return 0.3 * x_t
    return 0.3 * x_t + 0.1 * conditions.embeddings.sum(dim=(1, 2)).view(-1, 1, 1, 1)


@pytest.fixture
def images():
    return torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def index_of(images, features=None):
    return ReferenceIndex.build(
        images,
        features,
        captions=CAPTIONS,
        counts=torch.from_numpy(COPIES),
        groups=GROUPS.tolist(),
    )


def prediction_at(x_0):
    x_t = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5))
    a = torch.tensor(ALPHA_BAR)
    uncond = denoise(x_t, None)
    cond = uncond + ((x_t - a.sqrt() * x_0) / (1 - a).sqrt() - uncond) / SCALE
    return Prediction(
        x_t=x_t,
        alpha_bar=a,
        time=0.2,
        output=combine(cond, uncond, SCALE),
        output_cond=cond,
        output_uncond=uncond,
        conditions=encode(["asked"] * len(x_0)),
        guidance_scale=SCALE,
        prediction_type="epsilon",
        denoise=denoise,
        encode=encode,
    )


def counted(monkeypatch, index):
    """The searches of an index from now on: (queries, k)."""
    searches, search = [], index.search

    def counting(queries, k):
        searches.append((len(queries), k))
        return search(queries, k)

    monkeypatch.setattr(index, "search", counting)
    return searches


def caption_by_hand(nearness, k, m):
    """The most common caption of the k nearest groups' records if more than m, else the nearest's.

    Returns:
        All captions that are as common as the most common, or the nearest image's alone.
    """
    order = np.argsort(-nearness)
    groups = list(dict.fromkeys(GROUPS[order].tolist()))[:k]
    totals = {}
    for i in range(COUNT):
        if GROUPS[i] in groups:
            totals[CAPTIONS[i]] = totals.get(CAPTIONS[i], 0) + COPIES[i]
    most = max(totals.values())
    if most <= m:
        return [CAPTIONS[order[0]]]
    return [caption for caption, total in totals.items() if total == most]


@pytest.mark.parametrize(("k", "m"), [(1, 0), (4, 6), (4, 9), (10, 12), (23, 20), (23, 1000)])
def test_most_common_captions_are_those_of_a_count_by_hand(images, monkeypatch, k, m):
    index = index_of(images, Directions())
    x_0 = torch.cat([images[[3, 17, 30]], -images[[3]], images[[22, 8]]])
    x_0 = x_0 + 0.3 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7))
    plain = prediction_at(x_0)
    unit = plain.clean_estimate().double().flatten(1).numpy()
    references = images.double().flatten(1).numpy()
    cosines = (unit @ references.T) / np.linalg.norm(unit, axis=1)[:, None]
    cosines /= np.linalg.norm(references, axis=1)
    level = 0.75
    active = cosines.max(axis=1) > level
    assert 0 < active.sum() < len(x_0)

    searches = counted(monkeypatch, index)
    guided = SteadyAMG(
        index,
        EmbeddingSimilarity(),
        ConstantThreshold(level),
        c2=0.9,
        caption_policy="most_common",
        caption_neighbours=k,
        caption_records=m,
    )(plain)
    # All are compared with one neighbour; the k nearest are searched for the active ones alone.
    again = [(int(active.sum()), k)] if k > 1 else []
    assert searches == [(len(x_0), 1), *again]
    assert guided.active.tolist() == active.tolist()
    for i in range(len(x_0)):
        if not active[i]:
            assert torch.equal(guided.output[i], plain.output[i])
            continue
        s_2 = np.clip(0.9 * cosines[i].max(), 0, SCALE - 1)
        change = (plain.output[i] - guided.output[i]).double().numpy()
        # ε(y_N) − ε is the caption's vector, summed: which caption was it?
        fits = [
            caption
            for caption in sorted(set(CAPTIONS))
            if np.allclose(change, s_2 * 0.1 * sum(VECTORS[caption]), atol=1e-5)
        ]
        assert len(fits) == 1 and fits[0] in caption_by_hand(cosines[i], k, m)


def test_the_nearest_caption_is_the_default_and_takes_no_further_search(images, monkeypatch):
    index = index_of(images, Directions())
    plain = prediction_at(images[[3, 17, 30]] * 0.9 + 0.05)
    searches = counted(monkeypatch, index)
    guided = AntiMemorizationGuidance(
        index, EmbeddingSimilarity(), ConstantThreshold(-1.0), c1=0.2, c2=0.9
    )(plain)
    assert searches == [(3, 1)]
    for i, row in enumerate([3, 17, 30]):
        s_1, s_2 = guided.trace["s1"][i], guided.trace["s2"][i]
        cond = plain.output_cond[i] - plain.output_uncond[i]
        expected = plain.output[i] - s_1 * cond - s_2 * 0.1 * sum(VECTORS[CAPTIONS[row]])
        assert torch.allclose(guided.output[i], expected, atol=1e-5)


def test_neighbours_that_the_similarity_found_are_not_searched_again(images, monkeypatch):
    index = index_of(images)
    plain = prediction_at(images[[3, 17]] + 0.02)
    searches = counted(monkeypatch, index)
    SteadyAMG(
        index, NormalizedL2(k=12), ConstantThreshold(-1.0), c2=0.9, caption_policy="most_common"
    )(plain)
    assert searches == [(2, 12)]


def test_the_settings_carry_the_policy_and_wrong_numbers_are_refused(images):
    index = index_of(images, Directions())
    held_out = torch.rand(500, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
    calibrate(index, EmbeddingSimilarity(), held_out)
    settings = GuidanceSettings(
        "amg", caption_policy="most_common", caption_neighbours=7, caption_records=3
    )
    used = settings.anti_memorization(index).neighbour_conditions
    assert (used.policy, used.neighbours, used.records) == ("most_common", 7, 3)
    plain = GuidanceSettings("amg").anti_memorization(index).neighbour_conditions
    assert plain.policy == "nearest"
    groups = len(set(GROUPS.tolist()))
    for wrong in ({"caption_neighbours": groups + 1}, {"caption_neighbours": 0}):
        with pytest.raises(ValueError, match="caption_neighbours"):
            GuidanceSettings("amg", caption_policy="most_common", **wrong).anti_memorization(index)
    with pytest.raises(ValueError, match="caption_records must be at least 0"):
        GuidanceSettings("amg", caption_records=-1).anti_memorization(index)
