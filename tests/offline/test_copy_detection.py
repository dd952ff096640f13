"""SSCD's losses against plain loops; training, saving and indexing a small embedding."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from memfree.cli.entry import main
from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, DuplicationPlan, PartSizes
from memfree.models.options import AugmentationOptions
from memfree.offline.copy_detection import augment, info_nce, koleo
from memfree.offline.short_training import DistinctImages
from memfree.retrieval import ReferenceIndex, Whitened
from memfree.retrieval.features.copy_detection import CopyDetectionFeatures, CopyDetectionShape
from memfree.retrieval.features.make import features_from

TINY = ["--size", "8", "--widths", "[8,8]", "--dimension", "6", "--batch_size", "16"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    sizes = PartSizes(train=60, calibration=100, test=20, fit=30)
    prepare(out, parts=sizes, plan=DuplicationPlan(images=4, factor=8), seed=1)
    return out


def trained(dataset, out, *options):
    main(["train-embedding", "--dataset", str(dataset), "--out", str(out), *TINY, *options])
    return out


@pytest.fixture(scope="module")
def embedding(dataset, tmp_path_factory):
    return trained(dataset, tmp_path_factory.mktemp("embedding") / "e", "--steps", "12")


def views():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    group = torch.tensor([0, 1, 2, 1, 3])
    return functional.normalize(first, dim=1), functional.normalize(second, dim=1), group


def test_info_nce_is_its_definition():
    first, second, group = views()
    z = np.concatenate([first, second])
    of, groups = np.arange(10) % 5, np.tile(group, 2)
    total = 0.0
    for i in range(10):
        exponents = {}
        for j in range(10):
            positive = of[i] == of[j]
            if i != j and (positive or groups[i] != groups[j]):
                exponents[j] = math.exp(float(z[i] @ z[j]) / 0.2)
        total -= math.log(exponents[(i + 5) % 10] / sum(exponents.values()))
    assert float(info_nce(first, second, 0.2, group)) == pytest.approx(total / 10, rel=1e-9)


def test_koleo_is_its_definition():
    first, second, group = views()
    z, groups = np.concatenate([first, second]), np.tile(group, 2)
    logs = [
        math.log(min(np.linalg.norm(z[i] - z[j]) for j in range(10) if groups[j] != groups[i]))
        for i in range(10)
    ]
    assert float(koleo(first, second, group)) == pytest.approx(-np.mean(logs), rel=1e-9)


def test_koleo_is_finite_where_strangers_agree():
    first = functional.normalize(torch.ones(3, 4), dim=1).requires_grad_()
    loss = koleo(first, first, torch.arange(3))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(first.grad).all()


def test_augmentation_follows_its_generator_and_stays_in_range():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def once(seed):
        return augment(images, AugmentationOptions(), torch.Generator().manual_seed(seed))

    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))
    assert once(1).shape == images.shape and float(once(1).abs().max()) <= 1


def test_augmentation_without_strength_changes_nothing():
    # The resampling itself is exact to rounding where no crop, stretch or shift is drawn.
    images = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    off = AugmentationOptions(1.0, 0, 0, 0, 0, 0, 0, 0, 0)
    generator = torch.Generator().manual_seed(3)
    changed = augment(images.mean((2, 3), keepdim=True).expand_as(images), off, generator)
    assert torch.allclose(changed, images.mean((2, 3), keepdim=True).expand_as(images), atol=1e-5)
    mirrored = augment(images, AugmentationOptions(1.0, 0, 0, 1.0, 0, 0, 0, 0, 0), generator)
    assert mirrored.shape == images.shape


def test_blur_is_a_gaussian_of_each_image():
    from torchvision.transforms.functional import gaussian_blur

    from memfree.offline import copy_detection

    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = AugmentationOptions(blur=0.1)
    generator = torch.Generator().manual_seed(5)
    blurred = copy_detection._blurred(images, options, generator)
    generator = torch.Generator().manual_seed(5)
    largest = 0.1 * 16
    sigma = largest * torch.rand(3, generator=generator)
    chosen = torch.rand(3, generator=generator) < 0.5
    radius = math.ceil(3 * largest)
    for image, found, deviation, blurs in zip(images, blurred, sigma, chosen, strict=True):
        padded = functional.pad(image[None], [radius] * 4, mode="replicate")
        wanted = gaussian_blur(padded, 2 * radius + 1, float(deviation))[0]
        wanted = wanted[:, radius:-radius, radius:-radius] if blurs else image
        assert torch.allclose(found, wanted, atol=1e-5)


def test_distinct_images_are_of_the_parts_alone(dataset):
    folder = DatasetFolder(dataset)
    images = DistinctImages(folder, ["train", "fit"])
    assert len(images) == 90
    wanted = torch.cat([folder.part(name).images() for name in ("train", "fit")])
    assert {image.numpy().tobytes() for image in images.images()} == {
        image.numpy().tobytes() for image in wanted
    }
    batches = list(images.loader(40, 5, seed=3))
    assert [len(batch["image"]) for batch in batches] == [40] * 5
    rows = torch.cat([batch["row"] for batch in batches[:2]])
    assert len(rows.unique()) == 80  # within a permutation none repeats
    again = list(images.loader(40, 5, seed=3))
    assert all(torch.equal(a["row"], b["row"]) for a, b in zip(batches, again, strict=True))
    with pytest.raises(ValueError, match="only 90 images"):
        images.loader(91, 1, 0)


def test_the_seed_decides_the_weights(dataset, embedding, tmp_path):
    first = CopyDetectionFeatures.load(embedding)
    again = CopyDetectionFeatures.load(trained(dataset, tmp_path / "a", "--steps", "12"))
    other = CopyDetectionFeatures.load(
        trained(dataset, tmp_path / "b", "--steps", "12", "--seed", "1")
    )
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_training_lowers_the_loss(dataset, embedding, tmp_path):
    longer = trained(dataset, tmp_path / "long", "--steps", "150")
    loss = [
        json.loads((path / "manifest.json").read_text())["loss"] for path in (embedding, longer)
    ]
    assert loss[1] < loss[0] - 0.3


def test_an_index_holds_the_embedding(dataset, embedding, tmp_path):
    out = tmp_path / "index"
    options = ["--features", "copy_detection", "--extractor.path", str(embedding)]
    main(["index", "--dataset", str(dataset), "--out", str(out), *options])
    index = ReferenceIndex.load(out)
    images = DatasetFolder(dataset).part("test").images()
    features = CopyDetectionFeatures.load(embedding)
    assert torch.equal(index.features(images), features(images))
    assert torch.allclose(features(images).norm(dim=1), torch.ones(len(images)))
    assert "cosine" in index.calibrations
    fitted = Whitened.fit(features, images)
    again = features_from(fitted.describe(), fitted.tensors())
    assert torch.equal(again(images), fitted(images))


def test_gradients_reach_the_image(embedding):
    features = CopyDetectionFeatures.load(embedding)
    image = (0.1 * torch.randn(1, 1, 8, 8, dtype=torch.float64)).requires_grad_()
    features(image)[0, 0].backward()
    assert torch.isfinite(image.grad).all() and float(image.grad.abs().max()) > 0


def test_what_is_finished_is_not_trained_again(dataset, embedding, capsys):
    trained(dataset, embedding, "--steps", "12")
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trained(dataset, embedding, "--steps", "13")
    assert "steps is 12 there and 13 here" in capsys.readouterr().err


def test_a_damaged_embedding_is_refused(embedding, tmp_path):
    with pytest.raises(FileNotFoundError, match="no embedding folder"):
        CopyDetectionFeatures.load(tmp_path / "none")
    with pytest.raises(ValueError, match="has the shape"):
        CopyDetectionShape.from_json(
            {"channels": 3, "size": 1 << 20, "widths": [8], "dimension": 8}
        )
    features = CopyDetectionFeatures.load(embedding)
    with pytest.raises(ValueError, match="do not fit its shape"):
        CopyDetectionFeatures(CopyDetectionShape(), features.tensors())
    with pytest.raises(ValueError, match="images of 1 channels, not 3"):
        features(torch.zeros(1, 3, 8, 8))
