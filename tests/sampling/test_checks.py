"""Samplers keep the trained noise schedule; an index is another where anything used differs."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from memfree.retrieval import ReferenceIndex
from memfree.sampling.checks import build_scheduler, vectors_hash
from memfree.sampling.sample_run import SchedulerName

IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def built(counts=(6, 4, 1), captions=("cat", "dog", "cat"), **changed):
    """Records of two images: the first is there twice, under a caption each time."""
    images = IMAGES[[0, 0, 1]]
    given = {"groups": [0, 0, 1], "keys": ["a", "a", "b"], **changed}
    return ReferenceIndex.build(
        images, counts=torch.tensor(counts), captions=list(captions), **given
    )


def test_the_same_index_is_the_same():
    assert vectors_hash(built()) == vectors_hash(built())


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": (7, 3, 1)},  # the same multiplicity, and the same most frequent caption
        {"counts": (7, 4, 1)},
        {"captions": ("cat", "cow", "cat")},
        {"keys": ["a", "a", "c"]},
        {"groups": [0, 0, 0]},
        {"labels": torch.tensor([0, 1, 0])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_index_is_another(changed):
    assert vectors_hash(built(**changed)) != vectors_hash(built())


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_noise_schedule_is_kept(name):
    trained = DDPMScheduler(
        num_train_timesteps=200,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
    )
    made = build_scheduler(name, trained)
    assert torch.equal(made.alphas_cumprod, trained.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.get("use_karras_sigmas", False) == name.endswith("karras")
    made.set_timesteps(10)
    assert len(made.timesteps) == 10
