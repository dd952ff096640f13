"""CLIP score and margin by hand, and a tiny CLIP from command to evaluation."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from memfree.cli.entry import main
from memfree.data import DatasetFolder
from memfree.evaluation import agreement
from memfree.evaluation.agreement import ClipScorer, clip_scores, deranged, margins
from memfree.evaluation.metrics import HELDOUT, MetricTable
from memfree.offline.small_clip import thinned


class Fixed:
    """A scorer whose embeddings are given."""

    describe = {"clip": "fixed"}

    def __init__(self, images, texts):
        self._images, self._texts = images, texts

    def images(self, images):
        return self._images[[int(image.flatten()[0]) for image in images]]

    def texts(self, captions):
        return self._texts[[int(caption) for caption in captions]]


def unit(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "captions", [list("abcdefg"), list("aabbcc"), list("aaabbc"), list("aaaabcde")]
)
def test_no_image_keeps_its_caption(captions):
    found = set()
    for seed in range(20):
        rows = deranged(captions, seed)
        assert sorted(rows) == list(range(len(captions)))
        assert all(captions[row] != own for row, own in zip(rows, captions, strict=True))
        assert (rows == deranged(captions, seed)).all()
        found.add(tuple(rows))
    assert len(found) > 5


def test_most_captions_alike_have_no_derangement():
    with pytest.raises(ValueError, match="more than half"):
        deranged(list("aaab"), 0)


def test_margin_by_hand():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    captions = list("abcdef")
    wanted = []
    for i in range(6):
        others = [
            sum(images[i][d] * texts[deranged(captions, 5 + number)[i]][d] for d in range(4))
            for number in range(agreement.SHUFFLES)
        ]
        wanted.append(float(images[i] @ texts[i]) - sum(others) / len(others))
    assert margins(images, texts, captions, 5) == pytest.approx(wanted, abs=1e-12)
    assert clip_scores(images, texts)[2] == pytest.approx(float(images[2] @ texts[2]))


def test_metrics_of_pairs():
    count = 40
    texts = unit(count, 16)
    images = 0.7 * texts + 0.3 * unit(count, 16, seed=1)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    numbers = torch.arange(count).float().view(-1, 1, 1, 1)
    captions = [str(i) for i in range(count)]
    wrong = captions[1:] + captions[:1]
    metrics = agreement.alignment_metrics(
        Fixed(images, texts),
        {"none": (numbers, captions), "amg": (numbers, wrong)},
        {"amg": "none"},
        seed=0,
    )
    table = MetricTable(metrics)
    good, bad = (table.get("clip_margin", name) for name in ("none", "amg"))
    assert good.low > 0.5 and bad.low < 0 < bad.high + 0.1
    difference = table.get("clip_margin_difference", "amg")
    assert difference.value == pytest.approx(bad.value - good.value)
    assert difference.high < 0
    assert table.get("clip_score", "none").value == pytest.approx(
        float(np.mean([images[i] @ texts[i] for i in range(count)]))
    )


def test_words_are_left_out_by_the_generator():
    generator = torch.Generator().manual_seed(0)
    found = {thinned("a red square", 0.5, generator) for _ in range(50)}
    assert found <= {"a", "red", "square", "a red", "a square", "red square", "a red square"}
    assert len(found) >= 6
    assert thinned("square", 1.0, generator) == "square"
    assert thinned("a red square", 0.0, generator) == "a red square"
    assert len(thinned("a red square", 1.0, generator).split()) == 1


COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "gray": (90,) * 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Noisy pictures of four colours in two shapes, with captions."""
    root = tmp_path_factory.mktemp("colours")
    (root / "source").mkdir()
    generator = np.random.default_rng(0)
    for number in range(140):
        name, half = list(COLOURS)[number % 4], number // 4 % 2
        pixels = np.full((16, 16, 3), 255.0)
        pixels[4:12, (0 if half else 8) : (8 if half else 16)] = COLOURS[name]
        pixels = np.clip(pixels + generator.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "source" / f"{number:03d}.png")
        words = f"{name} {'left' if half else 'right'}"
        (root / "source" / f"{number:03d}.txt").write_text(words)
    sizes = {"train": 60, "calibration": 20, "test": 40, "fit": 20}
    options = [f"--parts.{part}={count}" for part, count in sizes.items()]
    main(
        ["prepare", "--source", "folder", "--path", str(root / "source"), "--near_distance", "0"]
        + ["--image_size", "16", "--channels", "3", "--out", str(root / "data"), *options]
    )
    return root / "data"


def trained(dataset, out, *options):
    small = ["--model.embedding", "16", "--model.text_width", "32", "--model.text_layers", "1"]
    small += ["--model.views", "2", "--model.context_length", "8", "--batch_size", "20"]
    main(["train-clip", "--dataset", str(dataset), "--out", str(out), *small, *options])
    return out


@pytest.fixture(scope="module")
def clip(dataset, tmp_path_factory):
    return trained(dataset, tmp_path_factory.mktemp("clip") / "c", "--steps", "40")


def test_unseen_pairs_are_above_shuffled(clip):
    report = json.loads((clip / "manifest.json").read_text())["test"]
    assert report["pairs"] == 40 and report["captions"] == 8
    assert report["low"] > 0 and report["median_rank"] <= 3


def test_open_clip_loads_it(dataset, clip):
    model = open_clip.create_model(f"local-dir:{clip}", require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    part = DatasetFolder(dataset).part("test")
    scorer = ClipScorer(clip)
    model.eval()
    with torch.no_grad():
        wanted = model.encode_text(tokenizer(part.captions), normalize=True)
    assert scorer.texts(part.captions) == pytest.approx(wanted.numpy(), abs=1e-5)
    # open_clip's own transform of the same pictures; it resizes bytes, we resize floats.
    _, transform = open_clip.create_model_from_pretrained(
        f"local-dir:{clip}", return_transform=True
    )
    images = part.images()
    pictures = [
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        for image in images
    ]
    with torch.no_grad():
        own = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
    assert (own.numpy() * scorer.images(images)).sum(1).min() > 0.995


def test_the_seed_decides_the_clip(dataset, tmp_path):
    hashes = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        folder = trained(dataset, tmp_path / name, "--steps", "2", "--seed", seed)
        hashes.append(ClipScorer(folder).describe["clip"]["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_bad_folders_are_one_line(dataset, clip, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="--clip"):
        ClipScorer(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no CLIP"):
        ClipScorer(dataset)
    bare = tmp_path / "bare"
    main(["prepare", "--out", str(bare)])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        trained(bare, tmp_path / "no")
    assert "has no captions" in capsys.readouterr().err


def test_evaluate_scores_captions(dataset, clip, tmp_path):
    from made_samples import make_samples

    data = DatasetFolder(dataset)
    main(["index", "--dataset", str(dataset), "--out", str(tmp_path / "index")])
    part = data.part("fit")
    right = part.captions
    wrong = [right[row] for row in deranged(right, 0)]
    for name, captions in (("unguided", right), ("amg", wrong)):
        make_samples(
            tmp_path / name, part.images(), None, data.hash, "none", trace=False, captions=captions
        )
    options = ["--dataset", dataset, "--index", tmp_path / "index", "--out", tmp_path / "out"]
    options += ["--samples.unguided", tmp_path / "unguided", "--samples.amg", tmp_path / "amg"]
    options += ["--false_positive_rate", "0.25", "--clip", clip]
    main(["evaluate", *map(str, options)])
    from memfree.evaluation.metrics import read_metrics

    table = read_metrics(tmp_path / "out" / "metrics.json")
    assert table.get("clip_margin", "unguided").low > 0
    assert table.get("clip_margin", "amg").value < table.get("clip_margin", "unguided").value
    assert table.get("clip_margin", HELDOUT).low > 0
    # The captions differ, so nothing is paired.
    assert table.get("clip_margin_difference", "amg") is None
