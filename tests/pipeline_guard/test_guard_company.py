"""The guarded pipeline among others: copies, sharers of its parts, subclasses, threads."""

import copy
import inspect
import json
import pickle
import threading
import warnings

import diffusers
import pytest
import tiny_pipelines
import torch
from guard_parts import NEVER, PROMPTS, ActiveRows, amg, drawn, make_index, noise, options, state

import memfree
from memfree.pipeline_guard.call import Call, Watched


@pytest.fixture
def pipe():
    return tiny_pipelines.stable_diffusion()


def img2img(pipe):
    return diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)


def auto(pipe):
    return diffusers.AutoPipelineForImage2Image.from_pipe(pipe)


def by_hand(pipe):
    parts = {**pipe.components, "requires_safety_checker": False}
    return diffusers.StableDiffusionImg2ImgPipeline(**parts)


def of_its_own_class(pipe):
    return pipe.from_pipe(pipe)


def constructed(pipe):
    return type(pipe)(**pipe.components, requires_safety_checker=False)


@pytest.mark.parametrize("make", [img2img, auto, by_hand, of_its_own_class, constructed])
def test_an_unguarded_pipeline_of_the_same_denoiser_is_reported(pipe, index, make):
    with memfree.guard(pipe, index, ActiveRows([0])) as report:
        other = make(pipe)
        other.set_progress_bar_config(disable=True)
        name = "stable_diffusion_img2img" if "Img2Img" in type(other).__name__ else ""
        with pytest.warns(UserWarning, match="from_pipe.*neither guided nor judged") as caught:
            inside = other(PROMPTS, **options(name)).images
            other(PROMPTS, **options(name))
        assert sum("neither guided" in str(one.message) for one in caught) == 1
        assert report.outside == 2 * other.num_timesteps and not report.verdicts
        drawn(pipe)
    assert len(report.verdicts) == 2
    assert f"called {report.outside} times by something else" in " ".join(str(report).split())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(other(PROMPTS, **options(name)).images, inside)
    assert not isinstance(vars(other)["image_processor"], Watched)


def test_a_pipeline_with_a_guard_of_its_own_is_not_reported(pipe, index):
    other = img2img(pipe)
    other.set_progress_bar_config(disable=True)
    with (
        warnings.catch_warnings(),
        memfree.guard(pipe, index, []) as first,
        memfree.guard(other, index, []) as second,
    ):
        warnings.simplefilter("error", UserWarning)
        drawn(pipe)
        other(PROMPTS, **options("stable_diffusion_img2img"))
    assert len(first.verdicts) == len(second.verdicts) == 2
    assert first.outside == second.outside == 0


def test_calls_from_outside_count_once_whatever_copies_there_are(pipe, index):
    hooks = len(pipe.unet._forward_pre_hooks)
    other = img2img(pipe)
    other.set_progress_bar_config(disable=True)
    with memfree.guard(pipe, index, []) as report:
        copied = copy.copy(pipe)
        deep = copy.deepcopy(copied)
        assert len(pipe.unet._forward_pre_hooks) == hooks + 1
        assert len(deep.unet._forward_pre_hooks) == hooks + 1
        with pytest.warns(UserWarning, match="neither guided nor judged"):
            other(PROMPTS, **options("stable_diffusion_img2img"))
        assert report.outside == other.num_timesteps
        copied.unet = deep.unet
        drawn(copied)
        other(PROMPTS, **options("stable_diffusion_img2img"))
        assert report.outside == 2 * other.num_timesteps
    assert len(pipe.unet._forward_pre_hooks) == len(deep.unet._forward_pre_hooks) == hooks


def test_a_pipeline_without_an_image_processor_says_so_as_ever(pipe, index):
    del pipe.image_processor
    with memfree.guard(pipe, index, []):
        assert not hasattr(pipe, "image_processor")


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_copies_are_guarded_inside_the_block_and_plain_after_it(pipe, index, make):
    plain = drawn(pipe)
    before, hooks = state(pipe), len(pipe.unet._forward_pre_hooks)
    with memfree.guard(pipe, index, ActiveRows([0])) as report:
        other = make(pipe)
        assert isinstance(other, diffusers.StableDiffusionPipeline)
        guided = drawn(other)
        assert torch.equal(guided[1], plain[1]) and not torch.equal(guided[0], plain[0])
        assert len(report.verdicts) == 2 and report.outside == 0
        again = make(other)
        drawn(pipe)
        kept = other.__call__
    for one in (other, again, pipe):
        assert type(one) is diffusers.StableDiffusionPipeline
        assert len(one.unet._forward_pre_hooks) == hooks and not one.unet._forward_hooks
        assert torch.equal(drawn(one), plain)
    assert torch.equal(kept(PROMPTS, **options("")).images, plain)
    assert state(pipe) == before and len(report.verdicts) == 4
    with memfree.guard(other, index, []) as report:  # and can be guarded
        drawn(other)
    assert len(report.verdicts) == 2


def test_a_pickle_and_a_saved_folder_are_of_the_pipelines_own_class(pipe, index, tmp_path):
    plain = drawn(pipe)
    with memfree.guard(pipe, index, ActiveRows([0])):
        pickled = pickle.dumps(pipe)
        pipe.save_pretrained(tmp_path)
        other = pickle.loads(pickled)
        assert type(other) is diffusers.StableDiffusionPipeline
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["_class_name"] == "StableDiffusionPipeline"
    assert torch.equal(drawn(other), plain)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(loaded), plain)


class Keywords(diffusers.StableDiffusionPipeline):
    """Defaults of its own, on the way to the class that names them."""

    def __call__(self, prompt=None, **kw):
        kw.setdefault("guidance_scale", 3.0)
        return super().__call__(prompt, **kw)


class Anything(diffusers.StableDiffusionPipeline):
    def __call__(self, *a, **kw):
        assert a  # the prompt is by position
        return super().__call__(*a, **kw)


class Further(Anything):
    """An option that the class above does not know."""

    def __call__(self, *a, loud=False, **kw):
        if loud:
            a = ([text.upper() for text in a[0]], *a[1:])
        return super().__call__(*a, **kw)


class Leading(diffusers.StableDiffusionPipeline):
    def __call__(self, style, *a, **options):
        prompts, *rest = a
        return super().__call__([f"{style} {text}" for text in prompts], *rest, **options)


@pytest.mark.parametrize(
    ("kind", "args", "more"),
    [
        (Keywords, [], {}),
        (Keywords, [], {"guidance_scale": 6.0, "negative_prompt": ["red", "blue"]}),
        (Anything, [], {"num_images_per_prompt": 1}),
        (Anything, [16, 16, 3], {"num_inference_steps": None}),
        (Further, [], {"loud": True}),
        (Leading, [16, 16], {}),
    ],
)
def test_subclasses_keep_their_options_and_defaults(index, kind, args, more):
    pipe = tiny_pipelines.stable_diffusion(kind=kind)
    first = ["old"] if kind is Leading else []

    def made():
        call = {**options(""), **more}
        if call["num_inference_steps"] is None:
            del call["num_inference_steps"]
        return pipe(*first, PROMPTS, *args, **call).images

    expected = made()
    with memfree.guard(pipe, index, amg(index, NEVER)) as report:
        assert torch.equal(made(), expected)
    assert len(report.verdicts) == 2 and type(pipe) is kind
    everything = make_index()
    everything.calibrations["nl2-k50-a0.5"]["sigmas"] = [-9.0] * 500
    with memfree.guard(pipe, everything, [], on_copy="resample", budget=2) as report:
        assert made() == [None, None]
    assert [one.draws for one in report.verdicts] == [2, 2]


def test_arguments_are_bound_by_the_class_that_names_them():
    call = Call.bind(Leading, ("old", PROMPTS, 24), {"eta": 0.5})
    assert call.given == {"style": "old", "prompt": PROMPTS, "height": 24, "eta": 0.5}
    assert call.positional == ("style", "prompt", "height")
    own = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    assert call.all["guidance_scale"] == own["guidance_scale"].default
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        Call.bind(Strict, (), {"promt": "a"})


class Strict(diffusers.StableDiffusionPipeline):
    def __call__(self, prompt=None):
        return super().__call__(prompt)


class Extra(diffusers.StableDiffusionPipeline):
    def __call__(self, *a, **kw):
        output = super().__call__(*a, **kw)
        output.images = output.images[:1]
        return output


def test_a_pipeline_that_returns_another_number_of_images_is_refused(index):
    pipe = tiny_pipelines.stable_diffusion(kind=Extra)
    with (
        memfree.guard(pipe, index, []),
        pytest.raises(ValueError, match="Extra returned 1 images, where prompt .* ask for 2"),
    ):
        drawn(pipe)


def test_calls_of_copies_in_threads_have_a_number_and_verdicts_each(pipe, index):
    """Each with a scheduler of its own, as servers do."""
    expected = [drawn(pipe, prompt=[f"picture {i}", "a cat"]) for i in range(3)]
    images = {}
    with memfree.guard(pipe, index, ActiveRows([1], 0.0)) as report:

        def draw(i):
            other = copy.copy(pipe)
            other.scheduler = copy.deepcopy(pipe.scheduler)
            images[i] = drawn(other, prompt=[f"picture {i}", "a cat"])

        threads = [threading.Thread(target=draw, args=[i]) for i in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    for i in range(3):
        torch.testing.assert_close(images[i], expected[i], rtol=0, atol=1e-6)
    assert sorted((one.call, one.image) for one in report.verdicts) == [
        (call, image) for call in range(3) for image in range(2)
    ]
    assert report.outside == 0


def test_every_guard_draws_a_seed_of_its_own_and_says_which(pipe):
    """Otherwise a server with a guard a request draws the same picture for all."""
    index = make_index()
    index.calibrations["nl2-k50-a0.5"]["sigmas"] = [-9.0] * 500  # everything is a copy
    seen, torch_state = [], torch.get_rng_state()

    def made(**seed):
        seen.clear()
        record = ActiveRows([0], 0.0)
        with memfree.guard(pipe, index, record, on_copy="resample", budget=2, **seed) as report:
            pipe("a cat", num_inference_steps=1, generator=noise(1)[0])
        return report, record.seen[-1].x_t

    (first, x_first), (second, x_second) = made(), made()
    assert first.seed != second.seed and not torch.equal(x_first, x_second)
    again, x_again = made(seed=first.seed)
    assert again.seed == first.seed and torch.equal(x_again, x_first)
    assert str(first.seed) in str(first)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert made(seed=0)[0].seed == 0


def test_a_guard_may_be_entered_again_and_each_block_has_its_report(pipe, index):
    guarding = memfree.guard(pipe, index, [])
    with guarding as first:
        drawn(pipe)
        with pytest.raises(ValueError, match="guards do not nest"), guarding:
            pass
        drawn(pipe)
    with guarding as second:
        drawn(pipe)
    assert len(first.verdicts) == 4 and len(second.verdicts) == 2 and first.seed != second.seed

    @guarding
    def served():
        return drawn(pipe)

    assert torch.equal(served(), served())
    assert type(pipe) is diffusers.StableDiffusionPipeline and not pipe.unet._forward_hooks
