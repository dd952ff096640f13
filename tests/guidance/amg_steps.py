"""Sampling steps whose clean estimates lie near images of an index, for the tests of AMG."""

import torch

from memfree.guidance import ConstantThreshold, Prediction
from memfree.guidance.prediction import combine
from memfree.retrieval import ReferenceIndex

ALPHA_BAR = 0.6
ANY = ConstantThreshold(-0.5)


def make_images():
    """80 independent images (1, 4, 4)."""
    return torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_index(images):
    """Their index; image i has label i mod 5."""
    return ReferenceIndex.build(images, labels=torch.arange(80) % 5)


class Network:
    """A linear denoiser that knows its conditions and counts the rows it is asked for."""

    def __init__(self, kind="epsilon"):
        self.calls = []
        self.kind = kind

    def __call__(self, x_t, conditions):
        self.calls.append(len(x_t))
        shift = 0.0 if conditions is None else 0.1 * (1 + conditions.view(-1, 1, 1, 1))
        return 0.3 * x_t + shift


def prediction_near(images, rows, kind="epsilon", s_0=3.0, distance=0.02, labels=None, last=False):
    """A step whose x̂_0 lies near the given training images (row −1: near none)."""
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(len(rows), 1, 4, 4, generator=generator)
    network = Network(kind)
    y = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels
    far = torch.rand(len(rows), 1, 4, 4, generator=generator) * 2 - 1
    x_0 = torch.stack([far[i] if row < 0 else images[row] for i, row in enumerate(rows)])
    x_0 = x_0 + distance * torch.randn(x_0.shape, generator=generator)
    a = torch.tensor(ALPHA_BAR)
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    output = eps if kind == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    uncond = network(x_t, None)
    cond = uncond + (output - uncond) / s_0
    network.calls.clear()
    return network, Prediction(
        x_t=x_t,
        alpha_bar=a,
        time=0.2,
        output=combine(cond, uncond, s_0),
        output_cond=cond,
        output_uncond=uncond,
        conditions=y,
        guidance_scale=s_0,
        prediction_type=kind,
        denoise=network,
        is_last=last,
        image_range=1.0,
    )
