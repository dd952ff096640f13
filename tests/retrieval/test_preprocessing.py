"""What SSCD, open_clip and timm do to an image, against their own transforms."""

import open_clip
import pytest
import timm
from tiny_networks import HALF, IMAGENET, photograph
from torchvision import transforms

from memfree.retrieval import SSCDFeatures
from memfree.retrieval.features.preprocessing import Preprocessing
from memfree.retrieval.features.sscd import PREPROCESSINGS

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


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
