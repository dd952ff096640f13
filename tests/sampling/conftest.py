"""A closed-form denoiser over a handful of images, and what sampling needs around it."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from memfree.guidance import NormalizedL2, calibrate
from memfree.retrieval import ReferenceIndex

SHAPE = (1, 4, 4)
CLASSES = 3


class Memorizer(nn.Module):
    """The optimal denoiser of a few images, each with a label, a little blurred by its input.

    It copies closely, but not exactly: at distance zero a similarity has no gradient.
    """

    def __init__(self, images: Tensor, labels: Tensor, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)
        self.register_buffer("labels", labels)
        self.register_buffer("alphas_cumprod", alphas_cumprod)

    def forward(self, x_t: Tensor, t: Tensor, conditions: Tensor | None) -> Tensor:
        a = self.alphas_cumprod[t.long()]
        references = self.images.flatten(1)
        gaps = (x_t.flatten(1)[:, None] - a.sqrt() * references).square().sum(2)
        logits = -gaps / (2 * (1 - a))
        if conditions is not None:
            logits = logits.masked_fill(conditions[:, None] != self.labels, -torch.inf)
        x_0 = 0.8 * (logits.softmax(1) @ references).reshape(x_t.shape) + 0.2 * a.sqrt() * x_t
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def labels() -> Tensor:
    return torch.arange(60) % CLASSES


@pytest.fixture
def trained() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


@pytest.fixture
def denoiser(images: Tensor, labels: Tensor, trained: DDPMScheduler) -> Memorizer:
    return Memorizer(images[:6], labels[:6], trained.alphas_cumprod)


@pytest.fixture
def index(images: Tensor, labels: Tensor) -> ReferenceIndex:
    made = ReferenceIndex.build(images, labels=labels, keys=[f"img{i}" for i in range(60)])
    held_out = torch.rand(500, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    calibrate(made, NormalizedL2(), held_out)
    return made
