"""Classifier-free guidance in one call of the network, and in two where that is asked or needed."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

from memfree.conditions import TextConditions
from memfree.guidance import ConstantThreshold, NormalizedL2, SteadyAMG
from memfree.models.loading import Denoiser
from memfree.models.text_pipeline import TextDenoiser
from memfree.sampling import sample

STEPS, BATCH = 4, 3


class Network(nn.Module):
    """Linear, row by row; notes the size of every batch, and has memory for so many rows."""

    def __init__(self, rows=100):
        super().__init__()
        self.rows = rows
        self.batches = []

    def forward(self, x_t, t, class_labels=None, encoder_hidden_states=None, **others):
        self.batches.append(len(x_t))
        if len(x_t) > self.rows:
            raise torch.OutOfMemoryError
        shift = 0.0 if class_labels is None else 0.1 * class_labels.reshape(-1, 1, 1, 1)
        if encoder_hidden_states is not None:
            shift = encoder_hidden_states.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return (0.3 * x_t + shift,)


def drawn(denoiser, conditions, **options):
    scheduler = DDIMScheduler(clip_sample=False)
    noise = torch.randn(BATCH, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"guidance_scale": 3.0, **options}
    return sample(denoiser, scheduler, noise, STEPS, conditions=conditions, **options).images


def labels():
    return torch.tensor([0, 2, 1])


def prompts(length=5):
    return TextConditions(torch.randn(BATCH, length, 6, generator=torch.Generator().manual_seed(1)))


def denoisers(network):
    return {
        "labels": (Denoiser(network, num_classes=3), labels()),
        "text": (TextDenoiser(network, (4, 4), prompts()[slice(0, 1)]), prompts()),
    }


@pytest.mark.parametrize("kind", ["labels", "text"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2 * BATCH] * STEPS),
        ({"one_call": False}, [BATCH] * 2 * STEPS),
        ({"guidance_scale": 1.0}, [BATCH] * STEPS),
    ],
)
def test_calls_of_the_network(kind, options, expected):
    network = Network()
    denoiser, conditions = denoisers(network)[kind]
    images = drawn(denoiser, conditions, **options)
    assert network.batches == expected
    # A network whose rows do not depend on their batch gives the same bits in every way.
    plain = drawn(lambda x, t, y: denoiser(x, t, y), conditions, **{**options, "one_call": False})
    assert torch.equal(images, plain)


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_too_little_memory_takes_two_calls_from_then_on(kind):
    network = Network(rows=BATCH)
    denoiser, conditions = denoisers(network)[kind]
    images = drawn(denoiser, conditions)
    assert network.batches == [2 * BATCH] + [BATCH] * 2 * STEPS
    denoiser, conditions = denoisers(Network())[kind]
    assert torch.equal(images, drawn(denoiser, conditions, one_call=False))


@pytest.mark.parametrize(
    "denoiser",
    [
        Denoiser(Network(), num_classes=None),
        TextDenoiser(Network(), (4, 4), prompts(7)[slice(0, 1)]),
        TextDenoiser(Network(), (4, 4), None),
    ],
)
def test_what_cannot_stand_in_one_batch_takes_two_calls(denoiser):
    """No unconditional branch of its own, or an empty prompt of another length."""
    null = getattr(denoiser, "null", None)

    def two_sided(x, t, y):
        return denoiser(x, t, None if null is None and y is None else y) if null else 0.5 * x

    two_sided.unconditional = denoiser.unconditional
    conditions = prompts() if isinstance(denoiser, TextDenoiser) else labels()
    drawn(two_sided, conditions)
    assert all(size == BATCH for size in denoiser.network.batches)


def test_a_real_network_differs_in_the_last_bits_alone_and_is_guided_alike(index):
    """Kernels of another batch size add up in another order."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )
    denoiser = Denoiser(network.eval().requires_grad_(False), num_classes=3)
    amg = SteadyAMG(
        index, NormalizedL2(), ConstantThreshold(-99.0), c1=0.1, c3=1.0, max_displacement=0.3
    )
    options = {"guidance": amg, "decode": lambda x: x[:, :1]}
    one = drawn(denoiser, labels(), **options)
    two = drawn(denoiser, labels(), one_call=False, **options)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
