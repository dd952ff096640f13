"""Audits: p-values, false discovery rate by its definition, images from anywhere, the page."""

import base64
import io
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from scipy.stats import false_discovery_control

from memfree.cli import entry
from memfree.commands.audit import audit, measure
from memfree.data import DatasetFolder
from memfree.evaluation.intervals import adjusted, are_discoveries, fewest_discoveries
from memfree.evaluation.neighbours import find_neighbours
from memfree.folders.manifest import read_manifest
from memfree.guidance import EmbeddingSimilarity, NormalizedL2, calibrate, calibration_of
from memfree.images import to_bytes
from memfree.retrieval import EfficientNetFeatures, ReferenceIndex


def step_up(p_values, rate):
    """Benjamini and Hochberg by definition: reject the k smallest, k the last under its line."""
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    k = max((i + 1 for i in range(m) if p_values[order[i]] <= rate * (i + 1) / m), default=0)
    return {order[i] for i in range(k)}


@pytest.mark.parametrize("seed", range(20))
def test_discoveries_are_those_of_the_definition(seed):
    generator = np.random.default_rng(seed)
    # Ties and the discrete values of a small calibration set, as p-values here have them.
    p_values = generator.integers(1, 40, 60) / 40
    p_values[: seed * 2] = 1 / 40
    for rate in (0.01, 0.05, 0.1, 0.3, 0.9):
        found = set(np.flatnonzero(are_discoveries(adjusted(p_values), rate)).tolist())
        assert found == step_up(p_values, rate + 1e-12)
    assert (adjusted(p_values) >= p_values - 1e-12).all() and adjusted(p_values).max() <= 1


@pytest.mark.parametrize(("m", "n"), [(0, 19), (1, 19), (50, 99), (60, 199), (1000, 999)])
def test_adjusted_p_values_are_those_of_scipy_but_for_rounding(m, n):
    p_values = np.random.default_rng(m).integers(1, n + 2, m) / (n + 1)
    p_values[: m // 3] = 1 / (n + 1)
    theirs = false_discovery_control(p_values)
    np.testing.assert_allclose(adjusted(p_values), theirs, rtol=1e-15)
    for rate in (0.01, 0.05, 0.1, 0.2, 0.5):
        found = are_discoveries(adjusted(p_values), rate)
        assert found.tolist() == are_discoveries(theirs, rate).tolist()


def test_what_is_exactly_on_the_line_is_a_discovery():
    """p_(k)·m/k = q in whole numbers: i/(n+1)·m·100 = k·percent, which floats miss by rounding."""
    missed = 0
    for n, m, percent in ((99, 50, 10), (199, 60, 5), (999, 1000, 1)):
        ties = [
            (i, k) for i in range(1, n) for k in range(1, m) if i * m * 100 == k * percent * (n + 1)
        ]
        for i, k in ties:
            p_values = np.ones(m)
            p_values[:k] = i / (n + 1)
            found = are_discoveries(adjusted(p_values), percent / 100)
            assert found.tolist() == [True] * k + [False] * (m - k)
            missed += int((adjusted(p_values) <= percent / 100).sum() < k)
            p_values[k - 1] = (i + 1) / (n + 1)
            assert are_discoveries(adjusted(p_values), percent / 100).sum() < k
    assert missed  # n = 99, m = 50, 35 images with p = 0.07 is one


@pytest.mark.parametrize(("m", "n", "rate"), [(60, 500, 0.05), (10, 19, 0.05), (1000, 99, 0.1)])
def test_the_fewest_images_of_a_discovery(m, n, rate):
    fewest = fewest_discoveries(m, n, rate)
    for k, possible in ((fewest, True), (fewest - 1, False)):
        p_values = np.ones(m)
        p_values[: min(k, m)] = 1 / (n + 1)
        assert bool(step_up(p_values, rate + 1e-12)) == (possible and k <= m)


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    """Ten training images under other names and sizes, and forty held-out ones."""
    data, out = DatasetFolder(dataset), tmp_path_factory.mktemp("pictures")
    (out / "deep").mkdir()
    train, fit = data.part("train"), data.part("fit")
    for i in range(10):
        image = Image.fromarray(to_bytes(train.images()[i, 0]).numpy())
        if i % 2:
            image.resize((16, 16), Image.Resampling.NEAREST).convert("RGB").save(
                out / "deep" / f"b{i}.png"
            )
        else:
            image.save(out / f"a{i}.png")
    for i in range(40):
        Image.fromarray(to_bytes(fit.images()[i, 0]).numpy()).save(out / f"real{i:02d}.png")
    (out / "broken.png").write_bytes(b"nothing")
    return out


def test_an_audit_of_a_folder(dataset, index, folder, tmp_path, capsys):
    audit(folder, index, tmp_path / "audit", false_discovery_rate=0.1)
    table = parquet.read_table(tmp_path / "audit" / "audit.parquet")
    rows = table.to_pylist()
    assert len(rows) == 50
    keys = DatasetFolder(dataset).part("train").keys
    loaded = ReferenceIndex.load(index)
    groups = dict(zip(loaded.keys, loaded.group.tolist(), strict=True))
    exact = {row["image"]: row for row in rows}
    for i in range(0, 10, 2):
        row = exact[f"a{i}.png"]
        assert groups[row["nearest_key"]] == groups[keys[i]]
        assert row["sigma"] == 0 and row["copy"] and row["p_value"] == row["p_value"]
    assert [row["sigma"] for row in rows] == sorted((row["sigma"] for row in rows), reverse=True)
    held = calibration_of(loaded, NormalizedL2()).sigmas.double().numpy()
    p_values = [(1 + (held >= row["sigma"]).sum()) / (1 + len(held)) for row in rows]
    assert [row["p_value"] for row in rows] == pytest.approx(p_values)
    found = {i for i, row in enumerate(rows) if row["discovery"]}
    assert found == step_up(p_values, 0.1) and len(found) >= 5
    text = " ".join(capsys.readouterr().out.split())
    assert f"{len(found)} at a false discovery rate of 10 %" in text
    assert "5 images of another size or number of channels were scaled" in text
    assert "1 of 51 images skipped" in text and "broken.png" in text
    assert f"1/{len(held) + 1}" in text
    manifest = read_manifest(tmp_path / "audit", "audit")
    assert manifest["false_discovery_rate"] == 0.1


def test_the_page_shows_pairs(index, folder, tmp_path):
    audit(folder, index, tmp_path / "audit", pairs=14)
    page = (tmp_path / "audit" / "index.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 28 and "this page contains training images" in page
    first, nearest = (np.array(Image.open(io.BytesIO(base64.b64decode(p)))) for p in pictures[:2])
    assert np.array_equal(first, nearest)  # exact copies come first
    assert "<script" not in page and "--page:" in page
    rows = parquet.read_table(tmp_path / "audit" / "audit.parquet").to_pylist()[:14]
    verdicts = [
        "called a copy"
        if row["discovery"]
        else "a copy on its own, not among 50 images"
        if row["copy"]
        else "not called a copy"
        for row in rows
    ]
    assert re.findall(r"<p>([^<]*copy[^<]*)</p>", page) == verdicts
    assert "not called a copy" in verdicts


def test_other_kinds_of_images(dataset, index, folder, samples, tmp_path):
    loaded = ReferenceIndex.load(index)
    one = measure(loaded, folder / "a2.png", 0.05)
    assert one.table["image"].to_pylist() == ["a2.png"] and one.table["copy"].to_pylist() == [True]
    drawn = measure(loaded, samples["unguided"], 0.05, batch_size=7, pairs=5)
    whole = measure(loaded, samples["unguided"], 0.05, pairs=5)
    assert drawn.table.equals(whole.table) and torch.equal(drawn.pictures, whole.pictures)
    assert drawn.table.num_rows == 60 and sum(drawn.table["copy"].to_pylist()) >= 25
    shard = tmp_path / "some.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(folder / "a4.png", "a4.png")
    by_name = measure(loaded, shard, 0.05)
    assert by_name.table["copy"].to_pylist() == [True]


def test_it_says_where_no_discovery_is_possible(dataset, index, folder):
    loaded = ReferenceIndex.load(index)
    held = DatasetFolder(dataset).part("calibration").images()[:19]
    calibrate(loaded, NormalizedL2(), held, 0.5)
    result = measure(loaded, folder, 0.01, 0.5)
    assert "No discovery is possible" in result.warning and "below 1/20" in result.warning
    assert not any(result.table["discovery"].to_pylist())
    # Possible in principle, but not with so few copies among so many.
    assert "it takes at least 50 such" in measure(loaded, folder, 0.051, 0.5).warning


@pytest.mark.parametrize("rate", [0.01, 0.051])
def test_no_page_says_that_none_are_copies_where_none_could_be_found(
    dataset, index, folder, tmp_path, rate
):
    loaded = ReferenceIndex.load(index)
    held = DatasetFolder(dataset).part("calibration").images()[:19]
    calibrate(loaded, NormalizedL2(), held, 0.5)
    loaded.save(tmp_path / "index")
    for name, at in [("undecided", rate), ("decided", 0.5)]:
        out = tmp_path / name
        audit(folder, tmp_path / "index", out, false_discovery_rate=at, false_positive_rate=0.5)
    pages = [(tmp_path / name / "index.html").read_text() for name in ("undecided", "decided")]
    heads = [re.findall(r"<h1>(.*)</h1>|<title>(.*)</title>", page) for page in pages]
    assert "0 of 50 images are called copies" not in str(heads[0])
    assert all("Undecided: " in "".join(found) for found in heads[0])
    assert all("images are called copies" in "".join(found) for found in heads[1])


def test_an_index_of_one_image_is_refused_in_one_line(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    index = ReferenceIndex.build(torch.rand(1, 1, 8, 8, generator=generator))
    calibrate(index, NormalizedL2(k=1), torch.rand(500, 1, 8, 8, generator=generator))
    index.save(tmp_path / "index")
    with pytest.raises(SystemExit):
        entry.main(["audit", str(folder), f"--index={tmp_path / 'index'}"])
    assert "the index has one group of images, and nL2" in capsys.readouterr().err


def test_every_image_is_embedded_once(dataset, folder):
    embedded = ReferenceIndex.build(dataset, EfficientNetFeatures())
    calibrate(embedded, EmbeddingSimilarity(), DatasetFolder(dataset).part("calibration").images())
    images = DatasetFolder(dataset).part("fit").images()[:12]
    seen, calibration = [], calibration_of(embedded, EmbeddingSimilarity())
    with embedded.features.register_forward_hook(lambda *call: seen.append(len(call[2]))):
        found = find_neighbours(embedded, EmbeddingSimilarity(), calibration, images, 0.3, 8)
    assert seen == [8, 4]
    vectors = embedded.features(images)
    distances = torch.cdist(vectors.double(), embedded.vectors.double())
    expected = [row[embedded.group != embedded.group[row.argmin()]].min() for row in distances]
    ratio = distances.min(dim=1).values / torch.stack(expected)
    np.testing.assert_allclose(found.distance_ratio, ratio, atol=1e-4)


def test_an_index_of_embeddings_shows_the_data_sets_images(dataset, index, folder, tmp_path):
    data = DatasetFolder(dataset)
    embedded = ReferenceIndex.build(dataset, EfficientNetFeatures())
    calibrate(embedded, EmbeddingSimilarity(), data.part("calibration").images())
    embedded.save(tmp_path / "embedded")
    audit(folder, tmp_path / "embedded", tmp_path / "without", pairs=3)
    audit(folder, tmp_path / "embedded", tmp_path / "with", dataset, pairs=3)
    pages = [(tmp_path / name / "index.html").read_text() for name in ("without", "with")]
    assert [page.count("data:image/png") for page in pages] == [3, 6]
    assert ["contains training images" in page for page in pages] == [False, True]


def test_the_command_takes_images_as_its_first_word(index, folder, capsys, tmp_path):
    entry.main(["audit", str(folder / "a2.png"), f"--index={index}"])
    assert "a2.png" in capsys.readouterr().out
    entry.main(["audit", f"--images={folder / 'a2.png'}", f"--index={index}"])
    for arguments, message in [
        ([str(tmp_path / "none"), f"--index={index}"], "no tar shards at"),
        ([str(tmp_path), f"--index={index}"], "no PNG, JPEG or WEBP images and no tar shards"),
        ([str(folder / "no.png"), f"--index={index}"], "no such file"),
        ([str(folder), "--index=nowhere"], "no index folder"),
        ([str(folder), f"--index={index}", "--false_positive_rate=1e-6"], "cannot be calibrated"),
        ([str(folder), f"--index={index}", f"--out={folder}"], "use another --out"),
        ([f"{folder}/broken.png", f"--index={index}"], "no image could be read"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            entry.main(["audit", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_names_are_shown_as_they_are(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    names = ["[/a].png", "[bold]k58.png", ":cat:.png"]
    for number, name in enumerate(names):
        values = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        path = tmp_path / "in" / name  # the first one is in a folder called [
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(values).save(path)
    out = tmp_path / "[/o]"
    audit(tmp_path / "in", index, out)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert f"Written to {out}: audit.parquet" in printed


def test_what_is_no_image_and_no_shard_is_refused(index, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(SystemExit):
        entry.main(["audit", f"--index={index}", str(tmp_path / "prompts.txt")])
    said = capsys.readouterr().err
    assert "prompts.txt is not an image (PNG, JPEG, WEBP), a folder or a tar shard" in said


@pytest.mark.parametrize("separate", [True, False])
def test_images_may_be_named_first_or_last(index, folder, capsys, separate):
    options, image = ["--index", str(index)], str(folder / "a2.png")
    options = options if separate else ["=".join(options)]
    printed = []
    for words in ([image, *options], [*options, image], [*options, "--images", image]):
        entry.main(["audit", *words])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and "a2.png" in printed[0]
