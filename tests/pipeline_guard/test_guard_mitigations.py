"""Every stage of a mitigation inside a guarded pipeline."""

from contextlib import contextmanager

import pytest
import tiny_pipelines
import torch
from guard_parts import (
    PROMPTS,
    SHAPE,
    drawn,
    make_index,
    make_latents,
    noise,
    options,
    random_images,
    state,
)

import memfree
from memfree.data.random_streams import GuardStream
from memfree.guidance import MITIGATIONS, GuidanceSettings
from memfree.guidance.mitigation import Mitigation
from memfree.pipeline_guard.session import sources


@pytest.mark.parametrize("name", MITIGATIONS)
def test_every_mitigation_of_the_settings_runs_in_the_guard(pipe, index, name):
    """By all its stages; what each does is tested with it, here that it reaches the pipeline."""
    settings = GuidanceSettings(name)
    settings.wen.target, settings.sail.threshold = 0.0, 0.0
    plain, before = drawn(pipe, guidance_scale=4.0), state(pipe)
    with memfree.guard(pipe, index, settings, latents=make_latents()) as report:
        images = drawn(pipe, guidance_scale=4.0)
    assert state(pipe) == before and torch.isfinite(images).all()
    assert report.trace.num_rows == 8 and len(report.verdicts) == 2
    # Random networks are near nothing and agree with themselves: these have nothing to act on.
    if name not in ("none", "amg", "reject", "prss", "jain"):
        assert not torch.equal(images, plain)
    assert torch.equal(drawn(pipe, guidance_scale=4.0), plain)


def test_wens_norm_is_in_the_trace(pipe, index):
    with memfree.guard(pipe, index, GuidanceSettings(wen_norm_steps=1)) as report:
        drawn(pipe, guidance_scale=4.0)
    assert all(norm > 0 for norm in report.trace["wen_norm"].to_pylist())


def test_captions_of_the_index_are_encoded_once_a_call_of_the_pipeline(pipe, index):
    rows = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    settings = GuidanceSettings("multiplicity")
    with handle, memfree.guard(pipe, index, settings, latents=make_latents()):
        for steps in (2, 5):
            rows.clear()
            drawn(pipe, guidance_scale=4.0, num_inference_steps=steps)
            # The prompts, the empty prompts, and the two captions of the index.
            assert rows == [2, 2, 2]


class AllStages(Mitigation):
    """Every stage changes something that the test can see."""

    def __init__(self):
        self.starts, self.inside, self.accepted = [], False, 0

    def prompts(self, prompts, generators):
        return [
            f"{text} {int(torch.randint(99, (1,), generator=g))}"
            for text, g in zip(prompts, generators, strict=True)
        ]

    def embedding(self, start):
        self.starts.append(start)
        embeddings = start.conditions.embeddings + 0.5
        return type(start.conditions)(embeddings, start.conditions.pooled, start.conditions.mask)

    def initial_noise(self, start):
        assert torch.equal(start.conditions.embeddings, self.starts[-1].conditions.embeddings + 0.5)
        return start.noise.flip(3)

    def guidance_scale(self, guidance_scale):
        return guidance_scale / 2

    @contextmanager
    def around(self, network):
        assert isinstance(network, torch.nn.Module)
        self.inside = True
        yield
        self.inside = False

    def guidances(self):
        def inside(prediction):
            assert self.inside
            return prediction

        return [inside]

    def accept(self, images):
        assert images.shape[1:] == SHAPE and images.min() >= -1 and images.max() <= 1
        self.accepted += 1
        return torch.tensor([True, self.accepted > 1][: len(images)][-len(images) :])


def test_every_stage_of_a_mitigation_runs(pipe, index):
    mitigation = AllStages()
    mitigation.accept = Mitigation().accept
    with memfree.guard(pipe, index, mitigation=mitigation):
        images = drawn(pipe, guidance_scale=8.0)
    start = mitigation.starts[0]
    assert start.guidance_scale == 4.0 and not mitigation.inside
    # The same by hand: the embeddings that the pipeline made of the new prompts, and the noise.
    texts = start.conditions.embeddings + 0.5
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in noise()])
    assert torch.equal(start.noise, latents)
    by_hand = pipe(
        prompt_embeds=texts,
        negative_prompt_embeds=start.unconditional.embeddings,
        latents=latents.flip(3),
        guidance_scale=4.0,
        num_inference_steps=4,
        output_type="pt",
    ).images
    torch.testing.assert_close(images, by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "pixart"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stages_of_other_families_and_without_classifier_free_guidance(index, name, scale):
    pipe = getattr(tiny_pipelines, name)()
    mitigation = AllStages()
    mitigation.accept = Mitigation().accept
    with memfree.guard(pipe, index, mitigation=mitigation):
        pipe(PROMPTS, guidance_scale=2 * scale, **options(name))
    start = mitigation.starts[0]
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in noise()])
    torch.testing.assert_close(start.noise, latents, rtol=0, atol=1e-5)
    output = start.denoise(start.noise, start.conditions)
    assert output.shape == start.noise.shape
    assert len(start.unconditional) == 2


def test_what_a_mitigation_does_not_accept_is_drawn_again(pipe, index):
    mitigation = AllStages()
    mitigation.embedding = Mitigation().embedding
    mitigation.initial_noise = Mitigation().initial_noise
    with memfree.guard(pipe, index, mitigation=mitigation) as report:
        drawn(pipe)
    assert [one.draws for one in report.verdicts] == [1, 2]
    assert report.verdicts[1].reason == "drawn again, not accepted by the mitigation"


@pytest.mark.parametrize("name", ["stable_diffusion_3", "stable_diffusion_img2img"])
def test_stages_that_a_family_does_not_define_are_refused(index, name):
    pipe = getattr(tiny_pipelines, name)()
    with (
        memfree.guard(pipe, index, mitigation=AllStages()),
        pytest.raises(ValueError, match="AllStages changes the .* not defined for StableDiff"),
    ):
        pipe(PROMPTS, **options(name))


FORMS = {
    "one tensor": lambda images: images[0],
    "a batch of one": lambda images: images[:1],
    "tensors": list,
    "a tensor": lambda images: images,
    "an array": lambda images: images.permute(0, 2, 3, 1).numpy(),
    "arrays": lambda images: list(images.permute(0, 2, 3, 1).numpy()),
    "batches": lambda images: [images[:2], images[2:]],
    "one array": lambda images: images[0].permute(1, 2, 0).numpy(),
}


class RejectsOnce(Mitigation):
    """Does not accept one image of the first draw."""

    def __init__(self, place):
        self.rejected = [place]

    def accept(self, images):
        accepted = super().accept(images)
        accepted[self.rejected] = False
        self.rejected = []
        return accepted


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("each", [1, 2])
def test_images_that_were_given_are_given_again_to_what_is_drawn_again(index, form, each):
    """Three prompts, as many as an image has channels; one image is not accepted at first."""
    pipe, begin = tiny_pipelines.stable_diffusion_img2img(), random_images(3, 3) / 2 + 0.5
    prompts, place = [*PROMPTS, "a dog"], 3 * each - 2
    call = {"num_inference_steps": 4, "strength": 0.8, "output_type": "pt"}

    def made(**more):
        given = {"image": FORMS[form](begin), "generator": noise(3 * each), **call, **more}
        return pipe(given.pop("prompt", prompts), **given).images

    expected = made(num_images_per_prompt=each)
    with memfree.guard(pipe, index, [], RejectsOnce(place), seed=7) as report:
        images = made(num_images_per_prompt=each)
    assert [one.draws for one in report.verdicts] == [1 + (i == place) for i in range(3 * each)]
    single = "one" in form
    again = made(
        prompt=prompts[place // each],
        image=begin[:1] if single else begin[place % 3 : place % 3 + 1],
        generator=sources(7, [place], 1, GuardStream.REDRAW),
    )
    torch.testing.assert_close(images[place], again[0], atol=1e-4, rtol=0)
    kept = [i for i in range(3 * each) if i != place]
    assert torch.equal(images[kept], expected[kept])


class Counting(Mitigation):
    """Accepts what is dark on the whole; remembers how many images it saw at a time."""

    def __init__(self, fail_at=None):
        self.sizes, self.fail_at = [], fail_at

    def accept(self, images):
        self.sizes.append(len(images))
        if self.fail_at is not None and len(images) >= self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean(dim=(1, 2, 3)) < images.mean()


def test_finished_images_are_accepted_in_chunks(pipe, index):
    whole, chunked = Counting(), Counting(fail_at=3)
    for mitigation, size in ((whole, None), (chunked, 2)):
        with memfree.guard(pipe, index, [], mitigation, budget=1, chunk_size=size):
            drawn(pipe, 5, prompt=["a"] * 5)
    assert whole.sizes == [5] and chunked.sizes == [2, 2, 1]
    line = r"out of memory .* a smaller chunk_size \(now 4\)"
    with (
        pytest.raises(torch.OutOfMemoryError, match=line),
        memfree.guard(pipe, index, [], Counting(fail_at=3), chunk_size=4),
    ):
        drawn(pipe, 5, prompt=["a"] * 5)


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("stable_diffusion_controlnet", False),
        ("stable_diffusion_controlnet", True),
        ("stable_diffusion_controlnet_img2img", True),
        ("stable_diffusion_controlnet_inpaint", False),
        ("stable_diffusion_xl_controlnet", True),
        ("stable_diffusion_inpaint", False),
        ("stable_diffusion_3_img2img", False),
    ],
)
@pytest.mark.parametrize("given", ["one", "each"])
def test_images_and_controls_of_what_is_drawn_again_are_its_own(name, several, given):
    """Image 2 of two prompts and two images a prompt, alone, sees what it saw among all."""
    nets = [tiny_pipelines.controlnet("xl" in name) for _ in range(2)]
    pipe = getattr(tiny_pipelines, name)(**({"controlnet": nets} if several else {}))
    call = {**options(name, 2), "num_images_per_prompt": 2, "generator": noise(4)}
    control = ""
    if "control" in name:
        control = "control_image" if "control_image" in call else "image"
    for each in ("image", "mask_image", "control_image"):
        if each in call and given == "one":
            call[each] = call[each][:1]
            call["generator"] = noise(1)[0]
        elif each in call and each != control:  # one an image, rather than a prompt
            call[each] = torch.cat([call[each], 1 - call[each]])
    if several:
        call[control] = [call[control], 1 - call[control]]
    conditions, embeddings = [], []
    if control:
        net = pipe.controlnet.nets[1] if several else pipe.controlnet
        net.register_forward_pre_hook(
            lambda module, args, kwargs: conditions.append((*args, *kwargs.values())),
            with_kwargs=True,
        )

    class Again(Mitigation):
        def accept(self, images):
            return torch.tensor([True, True, False, True] if len(images) == 4 else [True])

    def first_step(prediction):
        if prediction.step == 0:
            embeddings.append(prediction.conditions.embeddings)
        return prediction

    with memfree.guard(pipe, make_index(), first_step, mitigation=Again()) as report:
        pipe(PROMPTS, **call)
    assert [one.draws for one in report.verdicts] == [1, 1, 2, 1]
    everything, alone = embeddings
    torch.testing.assert_close(alone[0], everything[2], atol=1e-5, rtol=1e-4)
    if control:
        first, again = (
            next(one for one in values if getattr(one, "shape", ())[1:] == SHAPE)
            for values in (conditions[0], conditions[-1])
        )
        assert torch.equal(again[-1], first[-4:][2])  # of the conditional half
