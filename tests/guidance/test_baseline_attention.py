"""Ren's attention rescaling against the authors' procedure, row by row, and restored exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_text_model import TOKENS, embeddings, generators, start_of, tiny_unet

from memfree.conditions import TextConditions
from memfree.guidance.baselines import AttentionRescaling, AttentionRescalingOptions

PROMPTS = ["a", "a b", "a b c", "a b c d e f g h"]
LENGTHS = [3, 4, 5, TOKENS]
TIME = torch.tensor(500)


def count_tokens(prompts):
    return [min(len(prompt.split()) + 2, TOKENS) for prompt in prompts]


def ready(options=None, start=None):
    """The mitigation after its text stages, for four prompts."""
    method = AttentionRescaling(count_tokens, options or AttentionRescalingOptions())
    start = start or start_of(None)
    assert method.prompts(PROMPTS, generators(4)) == PROMPTS
    assert method.embedding(start) is start.conditions
    return method, start


def run(network, x, text):
    with torch.no_grad():
        return network(x, TIME, text).sample


def authors_attention(lengths, scale, mask_end=False):
    """Their attention in place of torch's, in float64, row by row; length 0 leaves a row alone."""
    plain = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        if key.shape[-2] != TOKENS:  # self-attention
            return plain(query, key, value)
        rows = []
        for q, k, v, length in zip(query, key, value, lengths, strict=True):
            logits = q.double() @ k.double().transpose(1, 2) / math.sqrt(q.shape[-1])
            if length:
                logits[:, :, length - mask_end :] = -math.inf
                logits[:, :, 0] = logits[:, :, 0] * scale
            rows.append((logits.softmax(-1) @ v.double()).to(v.dtype))
        return torch.stack(rows)

    return attention


@pytest.mark.parametrize("mask_end", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_conditional_rows_are_the_authors_and_others_keep_their_bits(mask_end, joined, monkeypatch):
    network = tiny_unet()
    method, start = ready(AttentionRescalingOptions(1.3, True, mask_end))
    x = start.noise
    text, empty = start.conditions.embeddings, start.unconditional.embeddings
    other = embeddings(4, 77)  # a neighbour's captions: unknown
    batches = [torch.cat([empty, text])] if joined else [empty, text, other]
    lengths = [[0] * 4 + LENGTHS] if joined else [[0] * 4, LENGTHS, [0] * 4]
    xs = [torch.cat([x, x])] if joined else [x] * 3
    plain = [run(network, one, y) for one, y in zip(xs, batches, strict=True)]
    with method.around(network):
        new = [run(network, one, y) for one, y in zip(xs, batches, strict=True)]
    for one, y, known, before, after in zip(xs, batches, lengths, plain, new, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(
                F, "scaled_dot_product_attention", authors_attention(known, 1.3, mask_end)
            )
            expected = run(network, one, y)
        changed = torch.tensor(known) > 0
        assert torch.allclose(after, expected, atol=1e-5)
        assert torch.equal(after[~changed], before[~changed])
        if changed.any():
            assert (after - before)[changed].flatten(1).abs().amax(1).min() > 1e-3


def test_a_batch_is_four_batches_of_one():
    network, (method, start) = tiny_unet(), ready()
    with method.around(network):
        together = run(network, start.noise, start.conditions.embeddings)
        for row in range(4):
            one = slice(row, row + 1)
            alone = run(network, start.noise[one], start.conditions.embeddings[one])
            assert torch.allclose(alone, together[one], atol=1e-5)


def test_neutral_options_change_nothing():
    network = tiny_unet()
    method, start = ready(AttentionRescalingOptions(1.0, False, False))
    before = dict(network.attn_processors)
    plain = run(network, start.noise, start.conditions.embeddings)
    with method.around(network):
        assert network.attn_processors == before
        assert torch.equal(run(network, start.noise, start.conditions.embeddings), plain)
    # A prompt of full length has no padding to mask.
    method, _ = ready(AttentionRescalingOptions(1.0, True, False), start)
    with method.around(network):
        masked = run(network, start.noise, start.conditions.embeddings)
    assert torch.allclose(masked[3], plain[3], atol=1e-5)
    assert not torch.allclose(masked[0], plain[0], atol=1e-5)


def test_processors_come_back_also_after_an_exception():
    network, (method, start) = tiny_unet(), ready()
    network.set_attn_processor(AttnProcessor())
    before = dict(network.attn_processors)
    plain = run(network, start.noise, start.conditions.embeddings)
    with pytest.raises(KeyError), method.around(network):
        changed = [n for n, one in network.attn_processors.items() if one is not before[n]]
        assert changed == [name for name in before if "attn2" in name]
        raise KeyError
    after = network.attn_processors
    assert all(after[name] is before[name] for name in before) and after.keys() == before.keys()
    assert torch.equal(run(network, start.noise, start.conditions.embeddings), plain)


def test_images_of_one_prompt_share_its_length_and_masks_come_first():
    method = AttentionRescaling(count_tokens)
    method.prompts(PROMPTS[:2], generators(2))
    start = start_of(None)
    method.embedding(start)
    assert method._known.lengths_of(start.conditions.embeddings).tolist() == [3, 3, 4, 4]
    mask = torch.arange(TOKENS) < torch.tensor([2, 3, 4, 5])[:, None]
    marked = TextConditions(start.conditions.embeddings, mask=mask)
    method.embedding(type(start)(**{**vars(start), "conditions": marked}))
    shuffled = start.conditions.embeddings[[2, 0]].clone()
    assert method._known.lengths_of(shuffled).tolist() == [4, 2]
    half = start.conditions.embeddings.half()
    assert method._known.lengths_of(half).tolist() == [2, 3, 4, 5]


def test_an_empty_prompt_counts_as_unconditional():
    start = start_of(None)
    start.conditions.embeddings[1] = start.unconditional.embeddings[1]
    method, _ = ready(start=start)
    assert method._known.lengths_of(start.conditions.embeddings).tolist() == [3, 0, 5, TOKENS]


def test_what_cannot_be_rescaled_is_refused():
    method = AttentionRescaling(count_tokens)
    with pytest.raises(ValueError, match="lengths of 0 prompts, but 4 samples"):
        method.embedding(start_of(None))
    for network in (
        UNet2DModel(
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        PixArtTransformer2DModel(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
            sample_size=8,
        ),
    ):
        with pytest.raises(ValueError, match="UNet2DConditionModel"), method.around(network):
            pass
    fused = tiny_unet()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="FusedAttnProcessor2_0"), method.around(fused):
        pass


def test_gradients_flow_to_the_text():
    network, (method, start) = tiny_unet(), ready()
    text = start.conditions.embeddings.clone().requires_grad_()
    with method.around(network):
        network(start.noise, TIME, text).sample.sum().backward()
    assert text.grad is not None and bool((text.grad[0, 3:] == 0).all())  # masked padding
    assert text.grad[0, :3].abs().min() > 0
