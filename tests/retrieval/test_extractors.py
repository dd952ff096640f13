"""Extractors made again from what an index says, from options, and what is refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_networks import (
    NAMES,
    SMALL_TIMM,
    Tiny,
    images_of,
    torchscript,
)
from torch import nn

from memfree.retrieval import (
    CLIPFeatures,
    LatentFeatures,
    PixelFeatures,
    ReferenceIndex,
    SSCDFeatures,
    TimmFeatures,
    Whitened,
)
from memfree.retrieval.features.make import features_from, make_features
from memfree.retrieval.features.sscd import DIMENSIONS, TRUST_VARIABLE
from memfree.retrieval.options import ExtractorOptions

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


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
        with pytest.raises(ValueError, match="not a TorchScript model"):
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
        (lambda: CLIPFeatures(None, path=tmp_path / "empty"), ValueError, "holds no CLIP"),
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
