"""What a guard refuses in one line when its block begins, and adapters that do not fit."""

import pytest
import tiny_pipelines
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from guard_parts import drawn, make_index, make_latents, state
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import memfree
from memfree.guidance import GuidanceSettings
from memfree.retrieval import ReferenceIndex


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def index():
    return make_index()


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
        pytest.raises(ValueError, match=message) as caught,
        memfree.guard(pipe, index, GuidanceSettings(name), latents=latents),
    ):
        pass
    assert "\n" not in str(caught.value)
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
        pytest.raises(ValueError, match=message) as caught,
        memfree.guard(pipe, index, GuidanceSettings("multiplicity"), latents=latents),
    ):
        pass
    assert "\n" not in str(caught.value)
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


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_pipe_that_cannot_read_is_refused(index, part):
    textless = tiny_pipelines.stable_diffusion(**{part: None})
    before, message = type(textless), f"needs the {part.replace('_', ' ')} of"
    with pytest.raises(ValueError, match=message), memfree.guard(textless, index):
        pass
    assert type(textless) is before


def test_a_path_is_no_index(pipe):
    with (
        pytest.raises(ValueError, match=r"not 'runs/index': give ReferenceIndex\.load"),
        memfree.guard(pipe, "runs/index"),
    ):
        pass


def test_adapters_of_another_model_leave_the_pipe_as_it_was(index, tmp_path):
    """The pipeline itself refuses them, inside the block as outside."""
    trained = tiny_pipelines.stable_diffusion()
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    type(trained).save_lora_weights(tmp_path, unet_lora_layers=layers)
    other = tiny_pipelines.stable_diffusion_xl()  # its text is wider
    expected, before = drawn(other), state(other)
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        memfree.guard(other, index, []) as report,
    ):
        drawn(other)
        other.load_lora_weights(tmp_path)
    assert len(report.verdicts) == 2  # of the images before
    assert state(other) == before
    other.unload_lora_weights()
    assert torch.equal(drawn(other), expected)
