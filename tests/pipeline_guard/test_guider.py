"""The guider on a modular Stable Diffusion XL pipeline, against the guard on the plain one."""

import pytest
import tiny_pipelines
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from guard_parts import NEVER, PROMPTS, ActiveRows, amg, noise

import memfree
from memfree.pipeline_guard import AntiMemorizationGuider


@pytest.fixture(scope="module")
def plain():
    return tiny_pipelines.stable_diffusion_xl()


@pytest.fixture
def modular(plain):
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = plain.components.items()
    made.update_components(
        **{name: part for name, part in parts if part is not None and name in made.component_names}
    )
    made.set_progress_bar_config(disable=True)
    return made


CALL = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "pt"}


def drawn(modular, guider):
    modular.update_components(guider=guider)
    return modular(prompt=PROMPTS, generator=noise(), output="images", **CALL)


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_where_nothing_is_active_it_is_classifier_free_guidance(modular, index, rescale):
    expected = drawn(modular, ClassifierFreeGuidance(4.0, guidance_rescale=rescale))
    guider = AntiMemorizationGuider(modular, index, amg(index, NEVER), 4.0, rescale)
    assert torch.equal(drawn(modular, guider), expected)
    assert guider.report.trace.num_rows == 8 and guider.report.calls == 1
    assert not modular.unet._forward_hooks


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_guides_as_the_guard_does(modular, plain, index, scale):
    guidance = [amg(index), ActiveRows([1])]
    with memfree.guard(plain, index, guidance) as report:
        expected = plain(PROMPTS, generator=noise(), guidance_scale=scale, **CALL).images
    guider = AntiMemorizationGuider(modular, index, guidance, scale)
    images = drawn(modular, guider)
    # The branches run one after the other here and together there: equal to rounding.
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    for name in ("sigma", "s1", "s2", "g_sim_norm"):
        torch.testing.assert_close(
            torch.tensor(guider.report.trace[name].to_pylist()),
            torch.tensor(report.trace[name].to_pylist()),
            atol=1e-3,
            rtol=1e-2,
        )


def test_other_pipelines_are_refused_in_one_line(plain, index):
    with pytest.raises(ValueError, match="not StableDiffusionXLPipeline"):
        AntiMemorizationGuider(plain, index, amg(index))
