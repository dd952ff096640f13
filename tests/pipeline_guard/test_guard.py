"""What the guard promises around the pipeline: restored, refused, judged, drawn again."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from guard_parts import (
    NEVER,
    PROMPTS,
    ActiveRows,
    amg,
    drawn,
    make_index,
    noise,
    options,
    random_images,
    refused,
    state,
)

import memfree
from memfree.guidance import GuidanceSettings, NormalizedL2, calibration_of
from memfree.pipeline_guard import GuardReport, Verdict
from memfree.retrieval import EfficientNetFeatures, ReferenceIndex


def test_the_default_guidance_runs_and_the_pipe_is_restored(pipe, index):
    drawn(pipe)
    before = state(pipe)
    with memfree.guard(pipe, index) as report:
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        drawn(pipe)
        drawn(pipe, 1, prompt="a cat", output_type="np")
    assert state(pipe) == before
    assert report.calls == 2 and [one.call for one in report.verdicts] == [0, 0, 1]
    assert report.trace["call"].to_pylist() == [0] * 8 + [1] * 4
    assert set(report.trace["step"].to_pylist()) == {0, 1, 2, 3}


def test_the_pipe_is_restored_after_an_exception(pipe, index):
    drawn(pipe)
    before = state(pipe)

    def broken(prediction):
        raise RuntimeError("in the guidance")

    with pytest.raises(RuntimeError, match="in the guidance"), memfree.guard(pipe, index, broken):
        drawn(pipe)
    assert state(pipe) == before
    with pytest.raises(KeyError), memfree.guard(pipe, index):
        raise KeyError
    assert state(pipe) == before
    assert torch.equal(drawn(pipe), drawn(pipe))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_verdicts_are_those_of_the_finished_images(pipe, index, output_type):
    with memfree.guard(pipe, index, []) as report:
        drawn(pipe, output_type=output_type)
    images = 2 * drawn(pipe).numpy().astype(np.float64) - 1
    references = index.vectors.numpy().astype(np.float64)
    gaps = images.reshape(2, 1, -1) - references
    distances = np.sqrt((gaps**2).sum(2))
    sigma = -distances.min(1) / (0.5 * np.sort(distances, 1)[:, :50].mean(1))
    held = calibration_of(index, NormalizedL2()).sigmas.numpy()
    for i, verdict in enumerate(report.verdicts):
        assert verdict.nearest == f"img{distances[i].argmin()}"
        assert verdict.similarity == pytest.approx(sigma[i], abs=2e-3)
        as_near = (held >= verdict.similarity).sum()
        assert verdict.p_value == pytest.approx((1 + as_near) / (1 + len(held)), rel=1e-6)
        assert verdict.threshold == np.sort(held)[-5] and not verdict.copy
    assert report.table().num_rows == 2


def holding(images):
    """An index of these images in [0, 1] and others; what is nearer than nL2 0.05 is a copy.

    Images of random networks are nearer to each other than to random pixels.
    """
    index = make_index(2 * images - 1)
    index.calibrations["nl2-k50-a0.5"]["sigmas"] = [-0.05] * 500
    return index


def test_a_copy_is_kept_with_its_verdict(pipe):
    index = holding(drawn(pipe))
    with memfree.guard(pipe, index, []) as report:
        images = drawn(pipe)
    assert torch.equal(images, drawn(pipe))
    assert [one.copy for one in report.verdicts] == [True, True]
    assert [one.nearest for one in report.verdicts] == ["img0", "img1"]
    assert report.verdicts[0].p_value == pytest.approx(1 / 501) and report.copies == report.verdicts
    text = str(report)
    assert "img1" in text and "copy" in text and "0.00" in text
    assert "Not covered: crops" in " ".join(text.split())


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_a_copy_is_refused_with_a_reason(pipe, output_type):
    index = holding(drawn(pipe)[1:])
    expected = drawn(pipe, output_type=output_type)
    with memfree.guard(pipe, index, [], on_copy="refuse") as report:
        images = drawn(pipe, output_type=output_type)
    assert len(images) == 2 and images[1] is None
    assert np.array_equal(np.array(images[0]), np.array(expected[0]))
    verdict = report.verdicts[1]
    assert verdict.refused and verdict.copy and "a copy of img0" in verdict.reason
    assert not report.verdicts[0].refused and report.verdicts[0].reason == ""
    assert "refused: a copy of img0" in " ".join(str(report).split())


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_copy_is_drawn_again_with_other_seeds(pipe, return_dict):
    index = holding(drawn(pipe)[1:])
    call = {**options("stable_diffusion"), "return_dict": return_dict}
    expected = drawn(pipe)

    def made(seed):
        with memfree.guard(pipe, index, [], on_copy="resample", seed=seed) as report:
            output = pipe(PROMPTS, **{**call, "generator": noise()})
        return (output.images if return_dict else output[0]), report

    images, report = made(0)
    assert torch.equal(images[0], expected[0]) and not torch.equal(images[1], expected[1])
    assert [one.draws for one in report.verdicts] == [1, 2]
    assert (
        not report.verdicts[1].copy and "drawn again, a copy of img0" in report.verdicts[1].reason
    )
    assert torch.equal(made(0)[0], images) and not torch.equal(made(1)[0][1], images[1])


def test_images_of_one_prompt_are_drawn_again_apart(pipe):
    prompts = ["a cat", "a cat"]
    index = holding(drawn(pipe, prompt=prompts))
    with memfree.guard(pipe, index, [], on_copy="resample") as report:
        images = drawn(pipe, prompt=prompts)
    assert [one.draws for one in report.verdicts] == [2, 2]
    assert not torch.equal(images[0], images[1])


def test_redrawn_images_have_their_own_prompt_and_trace(pipe):
    call = {"num_images_per_prompt": 2, "negative_prompt": ["x", "y"]}
    index = holding(drawn(pipe, 4, **call)[2:3])
    seen = ActiveRows([0], 0.0)
    with memfree.guard(pipe, index, seen, on_copy="resample") as report:
        drawn(pipe, 4, **call)
    assert [one.draws for one in report.verdicts] == [1, 1, 2, 1]
    first, again = seen.seen[0], seen.seen[4]
    assert len(first.x_t) == 4 and len(again.x_t) == 1
    # Prompts are encoded in batches of other sizes: equal to rounding.
    torch.testing.assert_close(again.conditions.embeddings[0], first.conditions.embeddings[2])
    redrawn = [row for row in report.trace.to_pylist() if row["draw"] == 1]
    assert [row["sample"] for row in redrawn] == [2] * 4


def test_what_is_still_a_copy_when_the_budget_is_spent_is_refused(pipe, index):
    """With every image a copy (a rate that calls half of the real ones so), none is left."""
    everything = make_index()
    everything.calibrations["nl2-k50-a0.5"]["sigmas"] = [-9.0] * 500
    with memfree.guard(pipe, everything, [], on_copy="resample", budget=3) as report:
        images = drawn(pipe)
    assert images == [None, None]
    assert all(one.draws == 3 and "after 3 draws" in one.reason for one in report.verdicts)


def test_refusals_are_one_line(pipe, index):
    cases = [
        (lambda: memfree.guard(object(), index), "does not support object"),
        (lambda: memfree.guard(pipe, index, on_copy="drop"), "on_copy must be"),
        (lambda: memfree.guard(pipe, index, budget=0), "budget must be a whole number of at l"),
        (lambda: memfree.guard(pipe, index, chunk_size=0), "chunk_size must be a whole number"),
        (lambda: memfree.guard(pipe, index, false_positive_rate=1e-4), "cannot be calibrated"),
        (lambda: memfree.guard(pipe, uncalibrated()), "no calibration"),
        (lambda: memfree.guard(nine_channels(), index), "takes 9 channels"),
        (lambda: memfree.guard(edm(), index), "sigma_data (EDM)"),
        (lambda: memfree.guard(inverted(), index), "invert_sigmas"),
        (lambda: memfree.guard(flux(), index), "once a branch"),
        (lambda: memfree.guard(pix2pix(), index), "a third branch"),
    ]
    for make, message in cases:
        with refused(re.escape(message)), make():
            pass


def uncalibrated():
    return ReferenceIndex.build(random_images(60, 1), groups=range(60))


def nine_channels():
    return tiny_pipelines.stable_diffusion(unet=tiny_pipelines.unet(in_channels=9))


def edm():
    return tiny_pipelines.stable_diffusion_xl(diffusers.EDMEulerScheduler())


def inverted():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return tiny_pipelines.stable_diffusion_3(scheduler)


def flux():
    return object.__new__(diffusers.FluxPipeline)


def pix2pix():
    return object.__new__(diffusers.StableDiffusionInstructPix2PixPipeline)


def test_the_readme_guards_a_pipeline_in_three_lines(pipe, index, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (block,) = (block for block in blocks if "memfree.guard(" in block)
    index.save(tmp_path / "runs" / "index")
    monkeypatch.chdir(tmp_path)
    names = {"pipe": pipe, "prompts": PROMPTS}
    exec(compile(block, "README.md", "exec"), names)
    assert len(names["images"]) == 2 and len(names["report"].verdicts) == 2
    assert "no copy" in capsys.readouterr().out


def test_importing_memfree_stays_fast():
    code = "import sys, memfree; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_guards_do_not_nest(pipe, index):
    before = type(pipe)
    with memfree.guard(pipe, index, []):
        with pytest.raises(ValueError, match="guarded already"), memfree.guard(pipe, index):
            pass
        drawn(pipe)  # the outer one stands
    assert type(pipe) is before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is an empty list"),
        (3, "prompt must be a text or a list of texts"),
        (["a", 3], "prompt must hold texts, not 3"),
        ([None], "prompt must hold texts"),
        (None, "needs a prompt"),
    ],
)
def test_wrong_prompts_are_one_line_and_lose_nothing(pipe, index, prompt, message):
    with memfree.guard(pipe, index, []) as report:
        drawn(pipe)
        with pytest.raises(ValueError, match=message):
            pipe(prompt, num_inference_steps=2)
        assert len(report.verdicts) == 2


def test_calls_that_the_guard_cannot_follow_are_refused(index):
    sd3 = tiny_pipelines.stable_diffusion_3()
    with (
        memfree.guard(sd3, index, []),
        pytest.raises(ValueError, match="skip_guidance_layers"),
    ):
        sd3(PROMPTS, skip_guidance_layers=[0])


def test_an_index_of_another_size_needs_an_embedding(pipe):
    small = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = ReferenceIndex.build(small, groups=range(60))
    memfree.guidance.calibrate(pixels, NormalizedL2(), small.flip(0) * 0.9, 0.1)
    with (
        memfree.guard(pipe, pixels, [], false_positive_rate=0.1),
        pytest.raises(ValueError, match="ask the pipeline for that height and width"),
    ):
        drawn(pipe)
    from memfree.guidance import EmbeddingSimilarity, calibrate

    embedded = ReferenceIndex.build(small, EfficientNetFeatures(), groups=range(60))
    calibrate(embedded, EmbeddingSimilarity(), small.flip(3), 0.1)
    with memfree.guard(pipe, embedded, false_positive_rate=0.1) as report:
        drawn(pipe)
    assert len(report.verdicts) == 2


def test_out_of_memory_says_which_option_lowers_it(pipe, index):
    def hungry(prediction):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nAnd more.")

    with (
        memfree.guard(pipe, index, hungry, chunk_size=4),
        pytest.raises(torch.OutOfMemoryError, match="smaller chunk_size \\(now 4\\)") as caught,
    ):
        drawn(pipe)
    assert "\n" not in str(caught.value) and "a decoder such as" in str(caught.value)
    small = tiny_pipelines.tiny_autoencoder()
    with (
        memfree.guard(pipe, index, hungry, chunk_size=1, decoder=small),
        pytest.raises(torch.OutOfMemoryError, match="no option lowers it further"),
    ):
        drawn(pipe)


def test_settings_and_an_index_without_captions_are_taken(pipe):
    index = make_index(captions=False)
    for guidance in (None, GuidanceSettings("none"), GuidanceSettings("amg", c2=0.0)):
        with memfree.guard(pipe, index, guidance) as report:
            drawn(pipe)
        assert report.trace.num_rows == 8


def test_a_lora_of_the_pipe_is_part_of_every_call(pipe, index):
    from peft import LoraConfig

    lora = tiny_pipelines.stable_diffusion()
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = drawn(lora)
    assert not torch.equal(expected, drawn(pipe))
    seen = ActiveRows([0], 0.0)
    with memfree.guard(lora, index, [amg(index, NEVER), seen]):
        assert torch.equal(drawn(lora), expected)
    one = seen.seen[-1]
    torch.testing.assert_close(one.denoise(one.x_t, one.conditions), one.output_cond)
    torch.testing.assert_close(one.denoise(one.x_t[1:], None), one.output_uncond[1:])


def test_keys_are_shown_as_they_are():
    keys = ["[/b]", "[bold]k58", ":cat:"]
    verdicts = [Verdict(0, i, key, -1.0, -1.5, 0.01, 0.5, True) for i, key in enumerate(keys)]
    refused = replace(verdicts[0], image=3, refused=True, reason="a copy of [/b] (σ -1.0)")
    text = str(GuardReport([*verdicts, refused]))
    assert all(key in text for key in keys) and "refused: a copy of [/b]" in text
