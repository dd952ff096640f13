"""What a guard refuses in one line when its block begins, and adapters that do not fit."""

import re

import pytest
import tiny_pipelines
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from guard_parts import drawn, make_index, make_latents, random_images, refused, state
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import memfree
from memfree.guidance import GuidanceSettings, NormalizedL2, calibrate
from memfree.guidance.mitigation import Mitigation
from memfree.retrieval import ReferenceIndex


@pytest.mark.parametrize(
    ("name", "captions", "latents", "message"),
    [
        ("amg", False, None, "the index has no captions, which c2 .* or give c2=0"),
        ("multiplicity", True, None, "the mitigation multiplicity needs latents="),
        ("both", True, make_latents(captions=False), "latents= has no captions"),
    ],
)
def test_settings_without_what_they_need_are_refused(pipe, name, captions, latents, message):
    before, index = state(pipe), make_index(captions=captions)
    with (
        refused(message),
        memfree.guard(pipe, index, GuidanceSettings(name), latents=latents),
    ):
        pass
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (make_index(), "latents= is an index of pixels, not of latents: give one that"),
        (make_latents(tiny_pipelines.autoencoder(1)), "latents= holds latents of another auto"),
        (
            make_latents(tiny_pipelines.autoencoder(scaling_factor=0.5)),
            "latents= holds latents of another autoencoder than the pipeline's: index with",
        ),
    ],
)
def test_references_of_another_space_are_refused(pipe, index, latents, message):
    before = state(pipe)
    with (
        refused(message),
        memfree.guard(pipe, index, GuidanceSettings("multiplicity"), latents=latents),
    ):
        pass
    assert state(pipe) == before


def test_references_of_images_of_another_size_are_refused(pipe, index):
    drawn(pipe)  # a call leaves marks of its own on the pipe
    before, larger = state(pipe), make_latents(size=32)
    with (
        pytest.raises(ValueError, match="x_t has 256 values, the references have 1024"),
        memfree.guard(pipe, index, GuidanceSettings("multiplicity"), latents=larger),
    ):
        drawn(pipe)
    assert state(pipe) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_autoencoder_in_half_precision_is_still_the_same(dtype, seed):
    """A decoder of its own does not change latents."""
    latents, vae = make_latents(), tiny_pipelines.autoencoder(seed).to(dtype)
    vae.decoder.conv_out.bias += 1
    assert latents.features.are_of(vae) == (seed == 0)


def test_latents_are_moved_to_the_pipe_and_back(pipe, index, monkeypatch):
    moved, latents = [], make_latents()
    monkeypatch.setattr(ReferenceIndex, "to", lambda self, device: moved.append(self))
    with memfree.guard(pipe, index, [], latents=latents):
        assert moved == [index, latents]
    assert moved == [index, latents] * 2


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("guidance", "amg", "give guidance=GuidanceSettings('amg')"),
        ("guidance", GuidanceSettings, "give an instance of it"),
        ("guidance", [GuidanceSettings("amg")], "a guidance, a list of them, or GuidanceSettings"),
        ("guidance", Mitigation(), "give it as mitigation="),
        ("guidance", 3, "a guidance, a list of them, or GuidanceSettings, not 3"),
        ("mitigation", "wen", "give guidance=GuidanceSettings('wen')"),
        ("mitigation", Mitigation, "give an instance of it"),
        ("latents", "runs/latents", "give ReferenceIndex.load(folder)"),
        ("budget", "3", "a whole number of at least 1, not '3'"),
        ("budget", True, "a whole number of at least 1, not True"),
        ("seed", -1, "a whole number of at least 0, not -1"),
        ("chunk_size", 1.5, "a whole number of at least 1, not 1.5"),
        ("false_positive_rate", "1%", "a number between 0 and 1, not '1%'"),
        ("false_positive_rate", 1, "a number between 0 and 1, not 1"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(pipe, index, name, value, instead):
    before = state(pipe)
    with (
        refused(f"memfree.guard: {name} must be .*{re.escape(instead)}"),
        memfree.guard(pipe, index, **{name: value}),
    ):
        pass
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number above 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number above 0"),
        ({"output_type": "foo"}, "cannot judge output_type 'foo'; use pil, np, pt, latent"),
        ({"guidance_scale": 1.0}, "MultiplicityGuidance needs the unconditional prediction .* 1:"),
    ],
)
def test_calls_are_refused_before_the_first_step(pipe, index, call, message):
    steps = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    settings = GuidanceSettings("multiplicity")
    with handle, memfree.guard(pipe, index, settings, latents=make_latents()) as report:
        with refused(message):
            drawn(pipe, **call)
        assert not steps and not report.verdicts and report.calls == 0
        drawn(pipe, guidance_scale=2.0)
    assert steps and len(report.verdicts) == 2


def test_undamped_captions_need_no_guidance_scale(pipe, index):
    settings = GuidanceSettings("multiplicity", damp_captions=False)
    with memfree.guard(pipe, index, settings, latents=make_latents()) as report:
        drawn(pipe, guidance_scale=1.0)
    assert len(report.verdicts) == 2


def test_settings_take_the_rate_of_the_guard(pipe):
    """With 100 calibration images no rate of 1 % can be had, which nobody asked for here."""
    index = make_index()
    calibrate(index, NormalizedL2(), random_images(100, 2), 0.1)
    rows = {}
    for name, rate in (("default", ()), ("same", (0.1,)), ("own", (0.2,))):
        settings = GuidanceSettings("amg", *rate)
        with memfree.guard(pipe, index, settings, false_positive_rate=0.1) as report:
            drawn(pipe)
        rows[name] = report.trace["lambda"].to_pylist()
        assert report.verdicts[0].false_positive_rate == 0.1
    assert rows["default"] == rows["same"] and max(rows["own"]) < max(rows["same"])


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_captions_that_nothing_can_encode_are_refused_before_the_first_step(index, part):
    textless = tiny_pipelines.stable_diffusion()
    prompts, empty = textless.encode_prompt(["a cat"] * 2, "cpu", 1, True)
    setattr(textless, part, None)
    call = {"prompt": None, "prompt_embeds": prompts, "negative_prompt_embeds": empty}
    steps = []
    handle = textless.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    with handle, memfree.guard(textless, index, GuidanceSettings("amg")):
        with pytest.raises(ValueError, match=f"needs the {part} of the pipeline, .*c2=0"):
            drawn(textless, **call)
        assert not steps
        drawn(textless, guidance_scale=1.0, **call)  # there eq. 15 has no part
    assert steps


def test_a_path_is_no_index(pipe):
    with (
        pytest.raises(ValueError, match=r"not 'runs/index': give ReferenceIndex\.load"),
        memfree.guard(pipe, "runs/index"),
    ):
        pass


def save_adapters(folder, network):
    """A LoRA of random weights for a U-Net like this one."""
    network.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def no_state(*_, **__):
    raise RuntimeError("Error(s) in loading state_dict for CLIPTextModel:\n\tsize mismatch")


@pytest.mark.parametrize("wrong", ["unet", "text_encoder"])
def test_adapters_of_another_model_leave_the_pipe_as_it_was(index, tmp_path, wrong, monkeypatch):
    """Refused in one line; an adapter that was there before stays, and no half of one is added."""
    save_adapters(tmp_path / "own", tiny_pipelines.unet())
    pipe = tiny_pipelines.stable_diffusion()
    pipe.load_lora_weights(tmp_path / "own", adapter_name="own")
    expected, before = drawn(pipe), state(pipe)
    if wrong == "unet":
        save_adapters(tmp_path / "other", tiny_pipelines.unet_xl())  # its text is wider
    else:
        save_adapters(tmp_path / "other", tiny_pipelines.unet())
        monkeypatch.setattr(StableDiffusionPipeline, "load_lora_into_text_encoder", no_state)
    with (
        refused("the LoRA does not fit this StableDiff"),
        memfree.guard(pipe, index, []) as report,
    ):
        drawn(pipe)
        pipe.load_lora_weights(tmp_path / "other")
    assert len(report.verdicts) == 2  # of the images before
    assert state(pipe) == before
    assert pipe.get_list_adapters() == {"unet": ["own"]}
    assert pipe.get_active_adapters() == ["own"] and torch.equal(drawn(pipe), expected)


def test_adapters_are_loaded_inside_the_block_as_outside(index, tmp_path):
    save_adapters(tmp_path, tiny_pipelines.unet())
    pipe, same = tiny_pipelines.stable_diffusion(), tiny_pipelines.stable_diffusion()
    same.load_lora_weights(tmp_path)
    with memfree.guard(pipe, index, []):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(drawn(pipe), drawn(same))


@pytest.mark.parametrize("scale", ["4", None, [4.0], True])
def test_a_guidance_scale_that_is_no_number_is_refused(pipe, index, scale):
    with (
        memfree.guard(pipe, index),
        refused("guidance_scale must be a number"),
    ):
        drawn(pipe, guidance_scale=scale)
