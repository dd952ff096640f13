"""Jain's opposite guidance and Wen's norm against their formulas written out."""

import numpy as np
import pytest
import torch
from scipy.signal import argrelextrema
from tiny_text_model import SHAPE, prediction_of

from memfree.guidance.baselines import OppositeGuidance, OppositeGuidanceOptions, WenNorm


def outputs(steps=12, count=4, seed=0):
    """Both branches of some steps, whose difference rises and falls by sample."""
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(steps, count, *SHAPE, generator=generator)
    size = torch.rand(steps, count, 1, 1, 1, generator=generator) + 0.2
    return uncond + size * torch.randn(steps, count, *SHAPE, generator=generator), uncond


def norms(cond, uncond):
    return torch.linalg.vector_norm((cond - uncond).double().flatten(2), dim=2).numpy()


def walk(guidance, cond, uncond, rows=slice(None), **fields):
    """Outputs and active rows of all steps, in one memory."""
    memory, steps = {}, len(cond)
    return [
        guidance(
            prediction_of(
                cond[step, rows],
                uncond[step, rows],
                step=step,
                time=1 - step / steps,
                memory=memory,
                **fields,
            )
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1.0, -7.5])
def test_static_transition_changes_the_scale_above_a_time(scale):
    cond, uncond = outputs()
    options = OppositeGuidanceOptions("static", 0.65, scale)
    (guidance,) = OppositeGuidance(options).guidances()
    for step, made in enumerate(walk(guidance, cond, uncond)):
        early = 1 - step / 12 > 0.65
        plain = prediction_of(cond[step], uncond[step])
        s = scale if early else 7.5
        u, c = uncond[step].double(), cond[step].double()
        assert torch.allclose(made.output.double(), u + s * (c - u), atol=1e-5)
        if not early:
            assert torch.equal(made.output, plain.output) and made.active is None
        else:
            assert bool(made.active.all())


def test_dynamic_transition_is_the_first_local_minimum_of_each_sample():
    cond, uncond = outputs()
    distance = norms(cond, uncond)
    options = OppositeGuidanceOptions("dynamic", scale_before=0.0)
    (guidance,) = OppositeGuidance(options).guidances()
    made = walk(guidance, cond, uncond)
    transitions = []
    for row in range(4):
        minima = argrelextrema(distance[:, row], np.less)[0]
        # A minimum is known one step later: from then on there is guidance.
        transitions.append(int(minima[0]) + 1)
        for step, one in enumerate(made):
            s = 7.5 if step >= transitions[-1] else 0.0
            expected = uncond[step, row] + s * (cond[step, row] - uncond[step, row])
            assert torch.equal(one.output[row], expected)
    assert len(set(transitions)) > 1


def test_a_sample_without_a_minimum_is_never_guided():
    uncond = torch.zeros(6, 1, *SHAPE)
    cond = torch.arange(6, 0, -1.0).reshape(6, 1, 1, 1, 1) * torch.ones(1, 1, *SHAPE)
    (guidance,) = OppositeGuidance(OppositeGuidanceOptions("dynamic")).guidances()
    assert all(bool(one.active.all()) for one in walk(guidance, cond, uncond))


@pytest.mark.parametrize("transition", ["static", "dynamic"])
def test_samples_and_batches_of_jain_are_independent(transition):
    cond, uncond = outputs()
    (guidance,) = OppositeGuidance(OppositeGuidanceOptions(transition)).guidances()
    together = walk(guidance, cond, uncond)
    for row in range(4):
        alone = walk(guidance, cond, uncond, slice(row, row + 1))
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one.output[0], all_.output[row])


def test_jain_without_strength_is_plain_guidance():
    cond, uncond = outputs()
    for options in (
        OppositeGuidanceOptions("static", transition_time=1.0),
        OppositeGuidanceOptions("dynamic", scale_before=7.5),
    ):
        (guidance,) = OppositeGuidance(options).guidances()
        for step, made in enumerate(walk(guidance, cond, uncond)):
            assert torch.equal(made.output, prediction_of(cond[step], uncond[step]).output)


def test_the_magnitude_of_v_is_that_of_epsilon():
    cond, uncond = outputs()
    observer = WenNorm(steps=3)
    made = walk(observer, cond, uncond, kind="v_prediction", alpha_bar=0.25)
    expected = norms(cond, uncond)[:3].mean(axis=0) / 2
    assert np.allclose(observer.score().numpy(), expected, rtol=1e-5)
    assert torch.equal(made[-1].trace["wen_norm"], observer.score())
    assert torch.equal(made[5].output, prediction_of(cond[5], uncond[5]).output)
    walk(observer, cond[:1], uncond[:1])
    assert np.allclose(observer.score().numpy(), norms(cond[:1], uncond[:1])[0], rtol=1e-5)


def test_one_branch_is_refused_in_one_line():
    (jain,) = OppositeGuidance().guidances()
    x = torch.zeros(4, *SHAPE)
    conditional = prediction_of(x, x, output_uncond=None, time=0.9)
    for guidance in (jain, WenNorm()):
        with pytest.raises(ValueError, match="needs classifier-free guidance"):
            guidance(conditional)
