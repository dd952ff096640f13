"""How references count under prompts, and when neighbours are searched."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from memfree.conditions import SAME, TextConditions, cosines, differ
from memfree.guidance import Cadence, MultiplicityGuidance, Observer, Prediction
from memfree.guidance.equations import ConstantThreshold
from memfree.guidance.multiplicity import CaptionWeights, LabelWeights
from memfree.guidance.prediction import combine
from memfree.guidance.similarity import Match
from memfree.retrieval import ReferenceIndex

CAPTIONS = ["red apple", "green apple", "red apple", "grinning face"]
COUNTS = [5, 1, 2, 1]
VECTORS = {
    "red apple": [1.0, 0.0, 0.0],
    "green apple": [0.8, 0.6, 0.0],
    "grinning face": [0.0, 0.0, 1.0],
    "unseen": [0.6, 0.8, 0.0],
}


def encode(texts):
    return TextConditions(torch.tensor([[VECTORS[text]] * 2 for text in texts]))


@pytest.fixture
def index():
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts = torch.tensor(COUNTS)
    return ReferenceIndex.build(images, captions=CAPTIONS, counts=counts, groups=[0, 1, 2, 3])


def test_records_without_a_caption_count_under_every_prompt():
    """Row 0 has 4 of 5 records with a caption, row 1 none of 3."""
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    repeated = images[[0, 0, 1, 2]]
    captions = ["red apple", None, None, "grinning face"]
    counts = torch.tensor([4, 1, 3, 2])
    index = ReferenceIndex.build(repeated, captions=captions, counts=counts)
    log_1, log_m = CaptionWeights(index, 0.0)(encode(["red apple", "unseen"]), encode)
    expected = np.array([[5.0, 3.0, 0.0], [1.0, 3.0, 0.0]])
    np.testing.assert_allclose(log_m.exp().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(log_1.exp().numpy(), expected / [5, 3, 2], rtol=1e-6)
    share = CaptionWeights(index, 0.0).share_of_first_records(encode(["red apple"]), encode)
    assert share.tolist() == pytest.approx([1 / 5])


def padded(texts, length, seed, dtype=torch.int64):
    """As T5 pads: the vectors behind the text are large, alike, and masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 50 + torch.randn(len(texts), length, 3, generator=generator)
    tokens[:, :2] = encode(texts).embeddings
    mask = torch.zeros(len(texts), length, dtype=dtype)
    mask[:, :2] = 1
    return TextConditions(tokens, mask=mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masked_tokens_do_not_count_in_a_sentence(index, dtype):
    texts = ["red apple", "unseen", "grinning face"]
    plain = encode(texts)
    masked = [padded(texts, 120, seed, dtype) for seed in (0, 1)]
    for one in masked:
        torch.testing.assert_close(one.sentence(), plain.sentence(), atol=1e-6, rtol=0)
    # Before, the padding alone decided: all prompts were the same.
    assert float(TextConditions(masked[0].embeddings).sentence()[0] @ plain.sentence()[2]) > 0.5
    weights = CaptionWeights(index, 0.2)(
        masked[0], lambda captions: padded(captions, 120, 2, dtype)
    )
    for made, expected in zip(weights, CaptionWeights(index, 0.2)(plain, encode), strict=True):
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bandwidth", [0.0, 0.2])
def test_captions_weigh_as_by_hand(index, bandwidth):
    prompts = ["red apple", "unseen", "grinning face"]
    log_1, log_m = CaptionWeights(index, bandwidth)(encode(prompts), encode)
    for row, prompt in enumerate(prompts):
        expected = np.zeros(4)
        for i, (caption, count) in enumerate(zip(CAPTIONS, COUNTS, strict=True)):
            cosine = float(np.dot(VECTORS[prompt], VECTORS[caption]))
            near = np.exp((cosine - 1) / bandwidth) if bandwidth else 0.0
            expected[i] = count * (1.0 if caption == prompt else near)
        if expected.sum() == 0:  # nothing fits: both are the same
            assert torch.equal(log_1[row], log_m[row])
            continue
        np.testing.assert_allclose(log_m[row].exp().numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(log_1[row].exp().numpy(), expected / COUNTS, rtol=1e-4)


def prediction(conditions, step=0, time=0.9, memory=None):
    noise = torch.randn(len(conditions), 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return Prediction(
        x_t=noise,
        alpha_bar=torch.tensor(0.3),
        time=time,
        output=noise,
        output_cond=noise,
        output_uncond=noise,
        conditions=conditions,
        guidance_scale=2.0,
        prediction_type="epsilon",
        denoise=lambda x, y: x,
        step=step,
        encode=encode,
        memory={} if memory is None else memory,
    )


def test_multiplicity_guidance_corrects_text_branches(index):
    guidance = MultiplicityGuidance(index, 1.0)
    given = prediction(encode(["red apple", "grinning face", "unseen"]))
    changed = guidance(given)
    moved = [
        (changed.output_cond - given.output_cond).flatten(1).abs().amax(dim=1),
        (changed.output_uncond - given.output_uncond).flatten(1).abs().amax(dim=1),
    ]
    assert moved[0][0] > 0  # two images with this caption, one of them repeated
    assert moved[0][1] == 0 and moved[0][2] == 0  # one image alone; none at all
    assert (moved[1] > 0).all()


@pytest.mark.parametrize(
    ("captions", "counts", "groups", "expected"),
    [
        # One image of 8 records: deduplication leaves 1 of 8.
        (["red apple", "unseen"], [8, 1], [0, 1], 1 / 8),
        # Near copies are one image: of 5 and 3 records, 1 of 8 is left.
        (["red apple", "red apple"], [5, 3], [0, 0], 1 / 8),
        # One of them has another caption: m_i(y)/m = 5/8 of a record is left of 5.
        (["red apple", "unseen"], [5, 3], [0, 0], 1 / 8),
        # A repeated image among others that are not: 5/6 + 1 + 1 are left of 5 + 1 + 1.
        (["red apple", "unseen", "red apple", "red apple"], [5, 1, 1, 1], [0, 0, 1, 2], 17 / 42),
        # No image of this caption is repeated.
        (["red apple", "unseen", "red apple"], [1, 9, 1], [0, 1, 2], 1.0),
    ],
)
def test_what_deduplication_leaves_of_a_caption_by_hand(captions, counts, groups, expected):
    """e(y) = Σ_i m_i(y)/m_i / Σ_i m_i(y), m_i the records of the whole group of i."""
    size = len(captions)
    images = torch.rand(size, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index = ReferenceIndex.build(
        images, captions=captions, counts=torch.tensor(counts), groups=groups
    )
    share = CaptionWeights(index, 0.5).share_of_first_records(encode(["red apple"]), encode)
    assert share.item() == pytest.approx(expected)


def test_half_precision_outside_does_not_reach_the_cosines(index):
    """Rounded to bfloat16, a caption would differ from itself, or be the same as a near one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 3, 64, generator=generator)
    near = tokens + 0.03 * torch.randn(1, 3, 64, generator=generator)
    known = dict.fromkeys(CAPTIONS, near) | {"red apple": tokens}

    def encode_64(texts):
        return TextConditions(torch.cat([known[text] for text in texts]))

    expected = CaptionWeights(index, 0.3).share_of_first_records(
        encode_64(["red apple"]), encode_64
    )
    with torch.autocast("cpu", torch.bfloat16):
        weights = CaptionWeights(index, 0.3)
        share = weights.share_of_first_records(encode_64(["red apple"]), encode_64)
    assert torch.equal(share, expected) and float(share) < 0.5


def test_sentences_are_compared_in_double_precision():
    """A GPU that may use TF32 rounds float32 to 11 bits; here bfloat16 stands for it."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 1, 64, generator=generator) for n in (20, 300))
    second[:20] = first
    a, b = (TextConditions(tokens).sentence() for tokens in (first, second))
    matmul, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            found = cosines(a, b)
    finally:
        matmul.fp32_precision = before
    expected = a.numpy().astype(np.float64) @ b.numpy().astype(np.float64).T
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7, rtol=0)
    assert torch.equal((found > SAME).nonzero(), torch.arange(20)[:, None].expand(20, 2))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_prompt_counts_as_after_deduplication(index, guidance_scale):
    """Of "red apple": two images of 5 and 2 records, of which deduplication leaves 2 of 7."""
    prompts = ["red apple", "unseen", "grinning face"]
    conditions = encode(prompts)
    share = CaptionWeights(index, 0.0).share_of_first_records(conditions, encode)
    torch.testing.assert_close(share, torch.tensor([2 / 7, 1.0, 1.0]))

    plain = prediction(conditions)
    cond, uncond = plain.output_cond + 1, plain.output_uncond
    plain = replace(
        plain,
        output_cond=cond,
        output=cond if guidance_scale == 1 else combine(cond, uncond, guidance_scale),
        output_uncond=None if guidance_scale == 1 else uncond,
        guidance_scale=guidance_scale,
        denoise=lambda x_t, y: x_t,
    )
    undamped = MultiplicityGuidance(index, 1.0)(plain)
    damped = MultiplicityGuidance(index, 1.0, damped=True)(plain)
    assert torch.equal(damped.output[1:], undamped.output[1:])
    if guidance_scale > 1:
        base = undamped.output_uncond[:1]
    else:  # the denoiser's own answer without a prompt, corrected
        base = undamped.denoise(plain.x_t[:1], None)
    expected = base + guidance_scale * 2 / 7 * (undamped.output_cond[:1] - base)
    torch.testing.assert_close(damped.output[:1], expected)


def test_influence_is_counted_once_a_sampling_and_row_by_row(index):
    """Rows keep their own share whatever their place; the captions are compared in one step."""
    prompts, calls = ["unseen", "red apple", "grinning face"], []

    def counted(texts):
        calls.append(list(texts))
        return encode(texts)

    guidance, memory = MultiplicityGuidance(index, 1.0, damped=True), {}
    for step in range(2):
        plain = prediction(encode(prompts), step, memory=memory)
        plain = replace(plain, output_cond=plain.output_cond + 1, encode=counted)
        undamped = MultiplicityGuidance(index, 1.0)(replace(plain, memory={}, encode=encode))
        damped = guidance(plain)
        for row in (0, 2):
            assert torch.equal(damped.output_cond[row], undamped.output_cond[row])
        base = undamped.output_uncond[1]
        expected = base + 2 / 7 * (undamped.output_cond[1] - base)
        torch.testing.assert_close(damped.output_cond[1], expected)
    assert len(calls) == 1


def test_captions_need_an_encoder_and_an_index_with_captions(index):
    with pytest.raises(ValueError, match="without a text encoder"):
        CaptionWeights(index, 0.0)(encode(["unseen"]), None)
    bare = ReferenceIndex.build(torch.rand(3, 1, 2, 2))
    with pytest.raises(ValueError, match="index with captions"):
        CaptionWeights(bare, 0.0)


def test_conditions_differ_by_row():
    assert differ(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [False, True]
    first, second = encode(["unseen", "red apple"]), encode(["unseen", "green apple"])
    assert differ(first, second).tolist() == [False, True]


class Counting:
    """A similarity that counts its searches."""

    name = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, index, images):
        self.calls += 1
        rows = torch.zeros(len(images), 1).long()
        return Match(torch.full((len(images),), float(self.calls)), rows, images.flatten(1))


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (3, [1, 1, 1, 2, 3, 4])])
def test_a_cadence_searches_every_n_steps_and_always_near_the_end(index, every, expected):
    similarity, memory, seen = Counting(), {}, []
    observer = Observer(index, similarity, ConstantThreshold(0.0), Cadence(every, always_below=0.4))
    for step, time in enumerate([0.9, 0.8, 0.7, 0.6, 0.4, 0.2]):
        out = observer(prediction(encode(["unseen"]), step, time, memory))
        seen.append(float(out.trace["sigma"][0]))
    assert seen == expected


def label_weights_by_hand(records, multiplicity, groups, label):
    """m_i(y) and m_i(y)/Σ_group m, by loops; unlabelled records count under every label."""
    m, first = [], []
    for row, of_row in enumerate(records):
        counted = of_row.get(label, 0) + multiplicity[row] - sum(of_row.values())
        total = sum(
            n for n, group in zip(multiplicity, groups, strict=True) if group == groups[row]
        )
        m.append(counted)
        first.append(counted / total)
    return first, m


@pytest.mark.parametrize("unlabelled", [0, 2])
def test_labels_weigh_as_by_hand(unlabelled):
    """An image whose copies carry two labels has one record in all, as one with two captions."""
    images = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    picture = torch.tensor([0, 0, 0, 1, 2, 3, 4, 4])
    labels, groups = torch.tensor([0, 0, 2, 0, 1, 2, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    index = ReferenceIndex.build(images[picture], labels=labels, groups=groups, num_classes=5)
    records = [{} for _ in range(5)]
    for row, label in zip(picture.tolist(), labels.tolist(), strict=True):
        records[row][label] = records[row].get(label, 0) + 1
    index.items.multiplicity[1] += unlabelled
    index.items.group_multiplicity[1] += unlabelled
    weights = LabelWeights(index)
    asked = torch.tensor([2, 0, 0, 1])
    log_1, log_m = weights(asked)
    arguments = (records, index.multiplicity.tolist(), index.group.tolist())
    for row, label in enumerate(asked.tolist()):
        first, m = label_weights_by_hand(*arguments, label)
        torch.testing.assert_close(log_1[row].exp(), torch.tensor(first))
        torch.testing.assert_close(log_m[row].exp(), torch.tensor(m, dtype=torch.float32))
    for unknown in (3, 4, 5, -1):
        with pytest.raises(ValueError, match=f"label {unknown} "):
            weights(torch.tensor([0, unknown]))
    assert weights(asked[:0])[0].shape == (0, 5)


def test_labels_and_captions_of_two_copies_weigh_alike():
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    picture, labels = torch.tensor([0, 0, 1, 2]), [0, 1, 0, 1]
    words = ["red apple", "green apple"]
    index = ReferenceIndex.build(
        images[picture], labels=torch.tensor(labels), captions=[words[i] for i in labels]
    )
    by_label = LabelWeights(index)(torch.tensor([0, 1]))
    by_caption = CaptionWeights(index, 0.0)(encode(words), encode)
    for label, caption in zip(by_label, by_caption, strict=True):
        torch.testing.assert_close(label, caption)


def test_many_labels_make_no_table_of_images_and_labels():
    """50 000 images of 1000 classes would be 400 MB; here nothing of that size is made."""
    count, classes = 400, 5000
    images = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) * 7 % classes
    index = ReferenceIndex.build(images, labels=labels, groups=range(count), num_classes=classes)
    held = [*vars(LabelWeights(index)).values(), *vars(index.items).values()]
    sizes = [
        tensor.numel()
        for value in held
        for tensor in (value if isinstance(value, tuple) else (value,))
        if isinstance(tensor, torch.Tensor)
    ]
    assert sizes and max(sizes) <= count
    assert torch.equal(index.labels, labels)
