"""SSCD, CLIP, timm and VAE features on tiny random networks, against computations of their own."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import transforms

from memfree.retrieval import (
    CLIPFeatures,
    LatentFeatures,
    PixelFeatures,
    ReferenceIndex,
    SSCDFeatures,
    TimmFeatures,
    Whitened,
)
from memfree.retrieval.extractors import ExtractorOptions, features_from, make_features
from memfree.retrieval.preprocessing import Preprocessing
from memfree.retrieval.sscd import DIMENSIONS, PREPROCESSINGS, TRUST_VARIABLE

SMALL_TIMM = "test_vit.r160_in1k"  # smooth, unlike a network of ReLUs


class Tiny(nn.Module):
    """A network of SSCD's signature."""

    def __init__(self, dimension=512, smooth=nn.GELU):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5, stride=4)
        self.smooth = smooth()
        self.linear = nn.Linear(8, dimension)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.smooth(self.convolution(images)).mean(dim=(2, 3)))


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def torchscript(path, network):
    torch.jit.trace(network.eval(), torch.zeros(1, 3, 64, 64)).save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture(scope="module")
def sscd_file(folder, tiny):
    return torchscript(folder / "sscd.pt", tiny)


CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(folder):
    torch.manual_seed(1)
    model = open_clip.CLIP(**CLIP_CONFIG)
    path = folder / "clip"
    path.mkdir()
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": settings}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def vae_folder(folder):
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "pipeline" / "vae")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def extractors(sscd_file, clip_folder, vae_folder):
    return {
        "sscd": SSCDFeatures(sscd_file, trust_file=True),
        "clip": CLIPFeatures(None, path=clip_folder),
        "timm": TimmFeatures(SMALL_TIMM),
        "latents": LatentFeatures.from_folder(vae_folder),
    }


NAMES = ["sscd", "clip", "timm", "latents"]


def images_of(count, height=24, width=24, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


# --- preprocessing


def photograph():
    """A smooth picture of 100 × 140 pixels, as PIL and as a tensor."""
    from sklearn.datasets import load_sample_images

    pixels = np.ascontiguousarray(load_sample_images().images[0][:400, :560])
    picture = Image.fromarray(pixels).resize((140, 100))
    tensor = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return picture, tensor


IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = transforms.Normalize([0.5], [0.5])
PUBLISHED = {
    "authors_288": [transforms.Resize(288), transforms.ToTensor(), IMAGENET],
    "authors_320": [transforms.Resize([320, 320]), transforms.ToTensor(), IMAGENET],
    "dcr": [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), HALF],
    "dcr_search": [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        IMAGENET,
    ],
    "amg": [transforms.Resize((224, 224)), transforms.ToTensor()],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sscd_images_are_prepared_as_published(name):
    picture, tensor = photograph()
    expected = transforms.Compose(PUBLISHED[name])(picture)[None]
    found = PREPROCESSINGS[name](tensor)
    assert found.shape == expected.shape
    # PIL rounds to bytes after each of two passes: 1/255 over the smallest deviation.
    assert (found - expected).abs().max() < 1.6 / 255 / 0.224
    assert (found - expected).abs().mean() < 0.4 / 255 / 0.224


def test_every_published_preprocessing_is_another(tiny, sscd_file):
    _, tensor = photograph()
    found = [
        SSCDFeatures(sscd_file, preprocessing=name, trust_file=True)(tensor) for name in PUBLISHED
    ]
    for i, first in enumerate(found):
        for second in found[i + 1 :]:
            assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [48, (40, 64)])
def test_clip_images_are_prepared_as_open_clip_does(mode, size):
    config = open_clip.transform.PreprocessCfg(size=size, resize_mode=mode, fill_color=50)
    picture, tensor = photograph()
    expected = open_clip.transform.image_transform_v2(config, is_train=False)(picture)[None]
    found = Preprocessing.of_open_clip(vars(config))(tensor)
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 48, 48), (3, 40, 64)])
def test_timm_images_are_prepared_as_timm_does(crop_mode, size):
    config = {
        "input_size": size,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "crop_pct": 0.9,
        "crop_mode": crop_mode,
    }
    picture, tensor = photograph()
    expected = timm.data.create_transform(**config, is_training=False)(picture)[None]
    found = Preprocessing.of_timm(config)(tensor)
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02


def test_interpolation_without_gradient_is_refused():
    with pytest.raises(ValueError, match="'lanczos'"):
        Preprocessing((8, 8), "exact", None, (0,) * 3, (1,) * 3, "lanczos")


# --- embeddings


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


# --- descriptions


@pytest.mark.parametrize("name", NAMES)
def test_a_description_makes_the_extractor_again(name, extractors):
    features = extractors[name]
    described = json.loads(json.dumps(features.describe()))
    again = features_from(described, {}, trust_file=True)
    images = images_of(2)
    assert torch.equal(again(images), features(images))
    whitened = Whitened.fit(features, images_of(30))
    again = features_from(whitened.describe(), whitened.tensors(), trust_file=True)
    assert torch.equal(again(images), whitened(images))
    assert again.metric == "cosine"


def test_other_weights_in_the_same_place_are_noticed(tmp_path, tiny):
    path = torchscript(tmp_path / "sscd.pt", tiny)
    described = SSCDFeatures(path, trust_file=True).describe()
    torchscript(path, Tiny())
    with pytest.raises(ValueError, match="other preprocessing or weights"):
        features_from(described, {}, trust_file=True)


def test_moved_weights_are_found_where_one_says(tmp_path, tiny):
    path = torchscript(tmp_path / "sscd.pt", tiny)
    images = images_of(6)
    index = ReferenceIndex.build(images, SSCDFeatures(path, trust_file=True))
    index.save(tmp_path / "index")
    moved = path.rename(tmp_path / "moved.pt")
    with pytest.raises(FileNotFoundError, match=r"sscd\.pt"):
        ReferenceIndex.load(tmp_path / "index", trust_file=True)
    again = ReferenceIndex.load(tmp_path / "index", weights=moved, trust_file=True)
    assert again.search(images, 1).rows[:, 0].tolist() == list(range(6))
    assert again.features.path == moved


@pytest.mark.parametrize("name", NAMES)
def test_an_index_holds_no_images_but_keeps_their_shape(name, extractors, tmp_path, monkeypatch):
    monkeypatch.setenv(
        TRUST_VARIABLE, f"00, {extractors['sscd'].weights_sha256}"
    )  # the user's word for commands that open an index
    images = images_of(5)
    ReferenceIndex.build(images, extractors[name]).save(tmp_path / "index")
    index = ReferenceIndex.load(tmp_path / "index")
    assert tuple(index.image_shape) == (3, 24, 24)
    assert index.search(images, 1).rows[:, 0].tolist() == list(range(5))
    with pytest.raises(ValueError, match="holds no images"):
        index.images(torch.tensor([0]))
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    found = "decoded" in manifest["contains_training_data"]
    assert found == (name == "latents")


def test_which_features_reveal_their_images(extractors):
    found = {name: extractors[name].reveals_images for name in NAMES}
    assert found == {"sscd": False, "clip": False, "timm": False, "latents": True}
    assert Whitened.fit(PixelFeatures(), images_of(9)).reveals_images
    assert not Whitened.fit(extractors["timm"], images_of(9)).reveals_images


# --- what is refused


def test_a_torchscript_file_is_loaded_only_if_it_is_trusted(sscd_file, monkeypatch):
    with pytest.raises(ValueError, match="trust_file true") as refused:
        SSCDFeatures(sscd_file)
    digest = SSCDFeatures(sscd_file, trust_file=True).weights_sha256
    assert digest in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv(TRUST_VARIABLE, digest)
    SSCDFeatures(sscd_file)


def test_what_is_no_sscd_model_is_refused(tmp_path, folder, tiny):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SSCDFeatures(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a model")
    torch.save(tiny.state_dict(), tmp_path / "state.pt")
    for name in ("text.pt", "state.pt"):
        with pytest.raises(ValueError, match="no TorchScript model"):
            SSCDFeatures(tmp_path / name, trust_file=True)
    short = torchscript(tmp_path / "short.pt", Tiny(dimension=7))
    with pytest.raises(ValueError, match=r"gives \(1, 7\) .* SSCD disc_mixup gives \(1, 512\)"):
        SSCDFeatures(short, trust_file=True)
    grey = tmp_path / "grey.pt"
    torch.jit.trace(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8)).save(str(grey))
    with pytest.raises(ValueError, match="does not map images to embeddings"):
        SSCDFeatures(grey, trust_file=True)
    large = torchscript(tmp_path / "large.pt", Tiny(DIMENSIONS["disc_large"]))
    assert SSCDFeatures(large, "disc_large", trust_file=True)(images_of(1)).shape == (1, 1024)


def test_wrong_weights_and_names_are_one_line(tmp_path, vae_folder, clip_folder):
    network = timm.create_model("test_resnet.r160_in1k")
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    (tmp_path / "empty").mkdir()
    cases = [
        (lambda: TimmFeatures("test_resnett"), ValueError, "did you mean test_resnet"),
        (lambda: TimmFeatures(SMALL_TIMM, path=tmp_path / "no"), FileNotFoundError, "no timm"),
        (
            lambda: TimmFeatures(SMALL_TIMM, path=tmp_path / "resnet.safetensors"),
            ValueError,
            "holds no weights of timm's test_vit",
        ),
        (lambda: CLIPFeatures("ViT-B-99", pretrained="openai"), ValueError, "no model 'ViT-B-99'"),
        (lambda: CLIPFeatures("ViT-B-32", pretrained="none"), ValueError, "no weights 'none'"),
        (lambda: CLIPFeatures("ViT-B-32"), ValueError, "either"),
        (lambda: CLIPFeatures(None, path=tmp_path / "no"), FileNotFoundError, "no CLIP"),
        (lambda: CLIPFeatures(None, path=tmp_path / "empty"), ValueError, "cannot be made"),
        (
            lambda: CLIPFeatures("ViT-B-32", path=clip_folder / "open_clip_model.safetensors"),
            ValueError,
            "cannot be made of",
        ),
        (lambda: LatentFeatures.from_folder(tmp_path / "no"), FileNotFoundError, "no VAE"),
        (lambda: LatentFeatures.from_folder(tmp_path / "empty"), ValueError, "no AutoencoderKL"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_options_make_extractors(sscd_file, clip_folder, vae_folder):
    made = {
        "pixels": ExtractorOptions(),
        "efficientnet": ExtractorOptions(),
        "sscd": ExtractorOptions(path=sscd_file, trust_file=True, preprocessing="dcr"),
        "clip": ExtractorOptions(path=clip_folder),
        "timm": ExtractorOptions(model=SMALL_TIMM, seed=3),
        "latents": ExtractorOptions(path=vae_folder, dtype="bfloat16"),
    }
    found = {name: make_features(name, options).describe() for name, options in made.items()}
    assert found["sscd"]["preset"] == "dcr"
    assert found["timm"]["seed"] == 3
    assert found["latents"]["dtype"] == "bfloat16"
    for name, options, message in [
        ("pixels", ExtractorOptions(dtype="bfloat16"), "--extractor.dtype does not apply"),
        ("clip", ExtractorOptions(path=clip_folder, seed=1), "--extractor.seed does not apply"),
        ("sscd", ExtractorOptions(), "--features sscd needs --extractor.path"),
        ("latents", ExtractorOptions(), "--features latents needs --extractor.path"),
        ("clip", ExtractorOptions(), "--extractor.pretrained"),
        ("timm", ExtractorOptions(), "--features timm needs --extractor.model"),
        ("timm", ExtractorOptions(model="x", pretrained="a"), "true or false"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_features(name, options)


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
