"""SSCD, CLIP, timm and VAE features on tiny random networks, against computations of their own."""

import json

import open_clip
import pytest
import timm
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_networks import (
    CLIP_CONFIG,
    IMAGENET,
    NAMES,
    SMALL_TIMM,
    images_of,
    photograph,
)
from torch.nn import functional

from memfree.retrieval import (
    CLIPFeatures,
    LatentFeatures,
    ReferenceIndex,
    SSCDFeatures,
    TimmFeatures,
    Whitened,
)
from memfree.retrieval.features.make import features_from

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def test_sscd_is_the_network_of_the_prepared_image(tiny, sscd_file, extractors):
    images = images_of(3, 20, 30)
    scaled = functional.interpolate((images + 1) / 2, (288, 432), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
    expected = functional.normalize(tiny((scaled - mean) / std), dim=1)
    assert torch.allclose(extractors["sscd"](images), expected, atol=1e-5)


def test_clip_is_open_clips_image_tower(clip_folder, extractors):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    picture, tensor = photograph()
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(picture)[None], normalize=True)
    assert (extractors["clip"](tensor) - expected).abs().max() < 0.01
    prepared = extractors["clip"].prepare(tensor)
    with torch.no_grad():
        expected = model.encode_image(prepared, normalize=True)
    assert torch.allclose(extractors["clip"](tensor), expected, atol=1e-6)


def test_clip_takes_a_named_model_with_a_checkpoint(clip_folder, tmp_path, monkeypatch):
    (tmp_path / "tiny-clip.json").write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    images = images_of(2)
    weights = clip_folder / "open_clip_model.safetensors"
    features = CLIPFeatures("tiny-clip", path=weights)
    # The tower is the same, the preprocessing is open_clip's default instead of the folder's.
    assert features.weights_sha256 == CLIPFeatures(None, path=clip_folder).weights_sha256
    assert features.preprocessing.interpolation == "bicubic"
    again = features_from(json.loads(json.dumps(features.describe())), {})
    assert torch.equal(again(images), features(images))
    torch.save(torch.load, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt"):
        CLIPFeatures("tiny-clip", path=tmp_path / "hostile.pt")


def test_timm_is_timms_network_without_its_head(extractors, tmp_path):
    features = extractors["timm"]
    network = timm.create_model(SMALL_TIMM, num_classes=10).eval()
    network.load_state_dict(features.network.state_dict(), strict=False)
    images = images_of(2, 40, 30)
    inputs = features.prepare(images)
    assert inputs.shape == (2, 3, 160, 160)
    expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
    assert torch.allclose(features(images), functional.normalize(expected, dim=1), atol=1e-6)
    # The same from files: with a classifier, in both formats.
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        local = TimmFeatures(SMALL_TIMM, path=tmp_path / name)
        assert torch.equal(local(images), features(images))
    assert not torch.equal(TimmFeatures(SMALL_TIMM, seed=1)(images), features(images))


def test_latents_are_the_scaled_mode_of_the_posterior(vae_folder, extractors):
    vae = AutoencoderKL.from_pretrained(vae_folder, subfolder="vae")
    images = images_of(2, 16, 24)
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0]
    expected = 0.7 * (mean - 0.1)
    latents = extractors["latents"].latents(images)
    assert latents.shape == (2, 4, 8, 12)
    assert torch.allclose(latents, expected, atol=1e-6)
    assert torch.equal(extractors["latents"](images), latents.flatten(1))
    assert LatentFeatures.from_folder(vae_folder / "vae").weights_sha256 == (
        extractors["latents"].weights_sha256
    )
    with pytest.raises(ValueError, match="takes 3 channels, not 2"):
        extractors["latents"](images[:, :2])


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_do_not_depend_on_the_batch(name, extractors):
    images = images_of(7)
    whole = extractors[name].embed(images)
    assert whole.dtype == torch.float32 and not whole.requires_grad
    assert torch.allclose(whole, extractors[name].embed(images, batch_size=2), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_and_training_mode_change_nothing(name, extractors):
    grey = images_of(2, channels=1)
    before = extractors[name](grey)
    extractors[name].train()
    assert torch.allclose(extractors[name](grey.expand(-1, 3, -1, -1)), before, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, extractors):
    """In float64, along random directions, through resizing, network and length."""
    features = extractors[name]
    was = features.dtype
    features.dtype = torch.float64
    features.double()
    try:
        images = images_of(2).double().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        shape = features(images).shape
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((weight * features(images)).sum(), images)
        for _ in range(3):
            direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            step = 1e-6 * direction
            with torch.no_grad():
                high, low = ((weight * features(images + s)).sum() for s in (step, -step))
            expected = float((high - low) / 2e-6)
            found = float((gradient * direction).sum())
            assert abs(found - expected) < 1e-5 * max(1.0, abs(expected))
            assert abs(expected) > 1e-6
    finally:
        features.dtype = was
        features.float()
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


def test_bfloat16_is_near_and_returns_float32(sscd_file, clip_folder, vae_folder):
    images = images_of(2)
    for make in (
        lambda dtype: SSCDFeatures(sscd_file, dtype=dtype, trust_file=True),
        lambda dtype: CLIPFeatures(None, path=clip_folder, dtype=dtype),
        lambda dtype: TimmFeatures(SMALL_TIMM, dtype=dtype),
        lambda dtype: LatentFeatures.from_folder(vae_folder, dtype=dtype),
    ):
        full, half = make("float32"), make("bfloat16")
        difference = full(images) - half(images)
        assert half(images).dtype == torch.float32
        assert 0 < difference.norm() < 0.05 * full(images).norm()
        assert half.describe()["dtype"] == "bfloat16"
        assert half.weights_sha256 == full.weights_sha256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_finds_the_same(name, extractors):
    images = images_of(6)
    expected = extractors[name].embed(images)
    try:
        extractors[name].to("cuda")
        found = extractors[name].embed(images, batch_size=4)
        assert found.device.type == "cuda"
        assert (found.cpu() - expected).norm() < 1e-2 * expected.norm()  # TF32 convolutions
        assert Whitened.fit(extractors[name], images).mean.shape == expected.shape[1:]
        index = ReferenceIndex.build(images, extractors[name]).to("cuda")
        assert index.search(images, 1).rows[:, 0].tolist() == list(range(6))
    finally:
        extractors[name].to("cpu")
