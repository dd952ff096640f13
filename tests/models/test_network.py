"""Networks and schedulers built from options, and options that do not fit."""

import pytest
import torch

from memfree.models import NetworkOptions, NoiseOptions, build_network, build_scheduler


def test_the_size_of_the_papers_cifar10_network():
    options = NetworkOptions(
        [128, 256, 256, 256], [False, True, True, False], 3, 32, 64, "scale_shift", 0.3
    )
    with torch.device("meta"):
        network = build_network(options, (3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(52.5e6, rel=0.01)


def test_the_digits_network_takes_images_and_labels():
    network = build_network(NetworkOptions(), (1, 8, 8), 10)
    assert sum(p.numel() for p in network.parameters()) == 1_164_513
    out = network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 5]), torch.tensor([0, 10])).sample
    assert out.shape == (2, 1, 8, 8)


def test_oblong_images_are_possible():
    network = build_network(NetworkOptions([8, 8], [False, False], 1, 4), (3, 4, 8))
    assert network(torch.zeros(1, 3, 4, 8), 0).sample.shape == (1, 3, 4, 8)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"attention": [True]}, (1, 8, 8), "network.attention has 1 entries and"),
        ({"norm_num_groups": 5}, (1, 8, 8), "norm_num_groups 5 does not divide 32"),
        ({}, (1, 6, 6), "images of 6x6 pixels cannot be halved 2 times"),
        ({"dropout": 1.0}, (1, 8, 8), "dropout is 1.0, but must be below 1"),
        ({"block_out_channels": [], "attention": []}, (1, 8, 8), "for each resolution"),
    ],
)
def test_options_that_do_not_fit(options, shape, message):
    with pytest.raises(ValueError, match=message):
        build_network(NetworkOptions(**options), shape)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
def test_any_scheduler_on_cumulative_alphas(name):
    scheduler = build_scheduler(NoiseOptions(name, 20, prediction_type="v_prediction"))
    assert type(scheduler).__name__ == name
    assert len(scheduler.alphas_cumprod) == 20
    assert scheduler.config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "NoScheduler", "UNet2DModel", "os"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=name):
        build_scheduler(NoiseOptions(name))
