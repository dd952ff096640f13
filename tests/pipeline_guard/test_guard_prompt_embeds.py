"""Embeddings in place of prompts: of any length, and where the text encoders are gone."""

import pytest
import tiny_pipelines
import torch
from guard_parts import NEVER, PROMPTS, ActiveRows, amg, options

import memfree
from memfree.guidance import GuidanceSettings

FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "pixart"]
NAMES = {
    "stable_diffusion": ["prompt_embeds", "negative_prompt_embeds"],
    "pixart": [
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ],
}
POOLED = [
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
]


def encoded(pipe, name, prompts=PROMPTS, **more):
    """The arguments that take the place of prompts."""
    if name == "stable_diffusion":
        values = pipe.encode_prompt(prompts, "cpu", 1, True)
    else:
        values = pipe.encode_prompt(
            **{
                "prompt": prompts,
                **({} if name == "pixart" else {"prompt_2": prompts}),
                **({"prompt_3": prompts} if name == "stable_diffusion_3" else {}),
                **more,
            }
        )
    call = dict(zip(NAMES.get(name, POOLED), values, strict=True))
    return {**call, "negative_prompt": None} if name == "pixart" else call


def resized(call, length):
    """The same embeddings of another number of tokens: their own again and again."""
    changed = {}
    for name, value in call.items():
        if value is None:
            changed[name] = None
            continue
        tokens = "pooled" not in name
        repeats = [1, 1 + length // value.shape[1], *[1] * (value.ndim - 2)]
        changed[name] = value.repeat(*repeats)[:, :length] if tokens else value
    return changed


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [7, 16, 19, 32, 40, 77])
def test_captions_are_brought_to_the_length_of_the_prompts(index, pipes, name, length):
    pipe, seen = pipes[name], ActiveRows([0], 0.0)
    call = {**options(name), **resized(encoded(pipe, name), length), "guidance_scale": 4.0}
    expected = pipe(**call).images
    call |= {"generator": options(name)["generator"]}
    with memfree.guard(pipe, index, [amg(index, NEVER), seen]):
        assert torch.equal(pipe(**call).images, expected)
    call |= {"generator": options(name)["generator"]}
    with memfree.guard(pipe, index, [amg(index), seen]) as report:
        images = pipe(**call).images
    assert torch.isfinite(images).all() and not torch.equal(images, expected)
    assert max(report.trace["s2"].to_pylist()) > 0  # the nearest image's caption was asked for
    conditions = seen.seen[0].encode(["picture 1", "picture 22"])
    assert conditions.embeddings.shape == (2, length, seen.seen[0].conditions.embeddings.shape[2])
    if name == "pixart":
        assert conditions.mask.shape == (2, length)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_captions_are_filled_up_with_the_encoding_of_no_text(index, pipes, name):
    pipe, seen = pipes[name], ActiveRows([0], 0.0)
    own = encoded(pipe, name, ["picture 1"])["prompt_embeds"]
    empty = encoded(pipe, name, [""])["prompt_embeds"]
    with memfree.guard(pipe, index, seen):
        pipe(**{**options(name), **resized(encoded(pipe, name), 40)})
    made = seen.seen[0].encode(["picture 1"]).embeddings
    torch.testing.assert_close(made, torch.cat([own, empty, empty], dim=1)[:, :40])


@pytest.mark.parametrize(("name", "length"), [("stable_diffusion_3", 24), ("pixart", 24)])
def test_t5_is_asked_for_the_rest_of_the_length(index, pipes, name, length):
    """As the pipeline itself encodes prompts of that ``max_sequence_length``."""
    pipe, seen = pipes[name], ActiveRows([0], 0.0)
    own = encoded(pipe, name, ["picture one"], max_sequence_length=length)
    others = encoded(pipe, name, max_sequence_length=length)
    with memfree.guard(pipe, index, seen):
        pipe(**{**options(name), **others})
    made = seen.seen[0].encode(["picture one"])
    torch.testing.assert_close(made.embeddings, own["prompt_embeds"])
    if name == "pixart":
        assert torch.equal(made.mask, own["prompt_attention_mask"])


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_may_be_freed_where_no_guidance_needs_captions(index, name):
    """Encode, free, generate: also inside the block, where the default loses its caption term."""
    pipe = getattr(tiny_pipelines, name)()
    call = {**options(name), **encoded(pipe, name), "guidance_scale": 4.0}

    def made():
        return pipe(**{**call, "generator": options(name)["generator"]}).images

    expected = made()
    with memfree.guard(pipe, index) as whole:
        made()
        assert not whole.left_out
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer"):
            if hasattr(pipe, part):
                setattr(pipe, part, None)
        made()
        assert "caption term" in whole.left_out[0] and len(whole.left_out) == 1
        assert "has no text_encoder" in " ".join(str(whole).split())
    for guidance in (amg(index, NEVER, c1=0.01, c3=30.0), []):
        with memfree.guard(pipe, index, guidance) as report:
            assert torch.equal(made(), expected)
        assert not report.left_out
    for guidance in (GuidanceSettings("amg", c2=0.0), None):
        with memfree.guard(pipe, index, guidance) as report:
            made()
        assert bool(report.left_out) == (guidance is None) and len(report.verdicts) == 2
    with memfree.guard(pipe, index, amg(index, c3=30.0, c1=0.01)) as report:
        assert not torch.equal(made(), expected)
    assert max(report.trace["g_sim_norm"].to_pylist()) > 0
    with (
        memfree.guard(pipe, index, amg(index)),
        pytest.raises(ValueError, match="SteadyAMG needs the text_encoder.*c2=0"),
    ):
        made()


def test_a_freed_first_encoder_of_two_is_missed_where_the_denoiser_takes_both(index):
    pipe = tiny_pipelines.stable_diffusion_xl()
    call = {**options(""), **encoded(pipe, "stable_diffusion_xl"), "guidance_scale": 4.0}
    pipe.text_encoder = pipe.tokenizer = None
    with (
        memfree.guard(pipe, index, amg(index)),
        pytest.raises(ValueError, match="needs the text_encoder of the pipeline"),
    ):
        pipe(**call)
    alone = tiny_pipelines.stable_diffusion_xl(  # as the refiner
        text_encoder=None,
        tokenizer=None,
        unet=tiny_pipelines.unet_xl(cross_attention_dim=tiny_pipelines.WIDTH),
    )
    with memfree.guard(alone, index, amg(index)) as report:
        alone(PROMPTS, guidance_scale=4.0, **options(""))
    assert max(report.trace["s2"].to_pylist()) > 0
