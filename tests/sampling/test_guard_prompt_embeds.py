"""Embeddings in place of prompts: of any length, and where the text encoders are gone."""

import pytest
import tiny_pipelines
import torch
from guard_parts import NEVER, PROMPTS, ActiveRows, amg, make_index, options

import memfree

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


@pytest.fixture(scope="module")
def index():
    return make_index()


@pytest.fixture(scope="module")
def pipes():
    return {name: getattr(tiny_pipelines, name)() for name in FAMILIES}


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
