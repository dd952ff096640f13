"""`memfree evaluate` and `memfree report` on real digits with samples of known content."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from made_samples import COUNT, make_samples
from pyarrow import parquet
from rich.console import Console

from memfree.cli.entry import main
from memfree.commands.evaluate import evaluate
from memfree.commands.report import report
from memfree.data import DatasetFolder
from memfree.evaluation import EvaluationFolder
from memfree.evaluation.inputs import measure_subjects, open_inputs
from memfree.folders.manifest import read_manifest
from memfree.guidance import calibrate
from memfree.retrieval import ReferenceIndex


@pytest.fixture(scope="session")
def metrics(evaluation):
    return EvaluationFolder(evaluation).metrics


def nl2_by_hand(images, references, k=50):
    """Eq. 8 in float64: distance to the nearest over half the mean of the k nearest."""
    a = images.flatten(1).double().numpy()
    b = references.flatten(1).double().numpy()
    distances = np.sort(np.sqrt(((a[:, None] - b[None]) ** 2).sum(2)), axis=1)[:, :k]
    return distances[:, 0] / (0.5 * distances.mean(1))


def test_copies_are_those_of_the_equation(dataset, samples, evaluation, metrics):
    from memfree.sampling import SampleFolder

    data = DatasetFolder(dataset)
    train = data.part("train").images()
    calibration = np.sort(nl2_by_hand(data.part("calibration").images(), train))
    threshold = calibration[5]  # the 6th of 600: rank ⌊0.01·601⌋
    for name, folder in samples.items():
        nl2 = nl2_by_hand(SampleFolder(folder).images(), train)
        found = metrics.get("copies", name)
        assert found.value == pytest.approx((nl2 < threshold).mean())
        assert found.count == COUNT
        assert metrics.get("nl2_minimum", name).value == pytest.approx(nl2.min(), rel=1e-4)
    assert metrics.get("copies", "unguided").value == 0.5
    assert metrics.get("copies", "amg").value < 0.05
    held = metrics.get("copies", "heldout")
    assert (held.count, held.low < 0.01 < held.high) == (500, True)


def test_one_row_an_image_with_its_p_value(dataset, evaluation):
    rows = parquet.read_table(evaluation / "per_sample.parquet").to_pylist()
    assert len(rows) == 2 * COUNT + 500
    data = DatasetFolder(dataset)
    train = data.part("train")
    calibration = nl2_by_hand(data.part("calibration").images(), train.images())
    copies = dict(zip(train.keys, train.copies.tolist(), strict=True))
    for row in rows[::23]:
        p_value = (1 + (calibration <= row["nl2"] + 1e-6).sum()) / 601
        assert row["p_value"] == pytest.approx(p_value, abs=1 / 601)
        assert row["copy"] == (row["p_value"] <= 0.01 + 1e-9)
        assert row["nearest_multiplicity"] == copies[row["nearest_key"]]
        assert row["sigma"] == -row["nl2"]
    assert {row["condition"] for row in rows} == set(range(10))


def test_dose_and_share_follow_the_duplicates(metrics):
    # All copies in `unguided` are of images with 64 records, of which there are 16.
    dose = metrics.get("copies_of_factor_64", "unguided")
    assert (dose.value, dose.detail["images"]) == (0.5, 16)
    assert metrics.get("copies_of_factor_1", "unguided").value == 0
    assert metrics.get("copies_per_image_of_factor_64", "unguided").value == COUNT / 2 / 16
    assert metrics.get("duplicated_share_ratio", "unguided").low > 5
    assert metrics.get("duplicated_share_ratio", "amg").low < 1.5


def test_the_second_measure_agrees_on_plain_copies(metrics):
    assert metrics.get("second_copies", "unguided").value == pytest.approx(0.5, abs=0.05)
    assert metrics.get("second_copies", "amg").value < 0.1
    assert metrics.get("second_copies", "heldout").value < 0.03
    assert metrics.get("second_copies", "amg").detail["components"] == 64


def test_known_copies_are_found_less_the_more_they_are_changed(metrics):
    found = [metrics.get(f"copies_of_noise_{d}", "changed").value for d in ("0.05", "0.1", "0.2")]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)


def test_quality_has_a_floor_at_equal_counts(metrics):
    for name in ("frechet_efficientnet", "frechet_pixels", "kid_efficientnet"):
        values = [metrics.get(name, subject) for subject in ("unguided", "amg", "heldout")]
        assert {one.count for one in values} == {COUNT}
    floor = metrics.get("frechet_pixels", "heldout").value
    assert floor < metrics.get("frechet_pixels", "unguided").value


def test_class_agreement_has_its_ceiling(metrics):
    assert metrics.get("class_agreement", "heldout").value > 0.9
    assert metrics.get("class_agreement", "amg").value > 0.9


def test_pairs_are_compared_with_the_unguided(metrics):
    difference = metrics.get("copies_difference", "amg")
    assert difference.detail["reference"] == "unguided"
    assert difference.high < -0.3 and "conditions" not in difference.detail
    assert metrics.get("frechet_pixels_difference", "amg") is not None
    assert metrics.get("copies_difference", "unguided") is None


def test_cost_comes_from_the_sample_manifests(metrics):
    assert metrics.get("seconds_per_sample", "amg").value == 0.01
    assert metrics.get("peak_memory_bytes", "unguided").value == 3e8
    assert metrics.get("active_share", "amg").value == pytest.approx(0.2)


def test_metrics_json_is_what_the_design_says(evaluation):
    entries = json.loads((evaluation / "metrics.json").read_text())
    names = {"metric", "subject", "value", "low", "high", "count", "detail"}
    assert all(set(entry) == names for entry in entries)
    manifest = read_manifest(evaluation, "evaluation")
    assert manifest["paired"] == {"amg": "unguided"}
    assert manifest["samples"]["amg"]["manifest"]["mitigation"] == "amg"


def test_the_same_command_gives_the_same_metrics(dataset, index, samples, evaluation, tmp_path):
    command = ["evaluate", "--dataset", str(dataset), "--index", str(index)]
    command += [f"--samples.{name}={folder}" for name, folder in samples.items()]
    out = tmp_path / "again"
    out.mkdir()
    main([*command, "--out", str(out)])
    assert (out / "metrics.json").read_text() == (evaluation / "metrics.json").read_text()
    assert not list(tmp_path.glob(".*"))


def test_unconditional_samples_without_trace_and_a_name_like_markup(dataset, index, tmp_path):
    data = DatasetFolder(dataset)
    images = data.part("fit").images()[:30]
    folder = make_samples(tmp_path / "s", images, None, data.hash, "none", trace=False)
    evaluate(dataset, index, {"<b>mine</b>": folder}, tmp_path / "e")
    found = EvaluationFolder(tmp_path / "e")
    assert found.reference == "<b>mine</b>"
    assert found.metrics.get("class_agreement", "<b>mine</b>") is None
    report(tmp_path / "e", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Of the &lt;b&gt;mine&lt;/b&gt; samples none of" in page
    assert "<b>mine</b>" not in page


# --- bad input: one line, exit status 2, nothing written ---


@pytest.fixture(scope="module")
def bad(dataset, index, tmp_path_factory):
    """Folders that do not fit the dataset and its index."""
    root = tmp_path_factory.mktemp("bad")
    loaded = ReferenceIndex.load(index)
    loaded.dataset_hash = "0" * 64
    loaded.save(root / "other_index")
    ReferenceIndex.build(dataset).save(root / "uncalibrated")
    (root / "full").mkdir()
    (root / "full" / "thesis.tex").touch()
    images = DatasetFolder(dataset).part("fit").images()[:20]
    make_samples(root / "foreign", images, None, "f" * 64, "none", trace=False)
    make_samples(root / "small", torch.zeros(3, 1, 4, 4), None, None, "none")
    return root


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("index", "other_index", "--index different dataset"),
        ("index", "uncalibrated", "no calibration"),
        ("samples.unguided", "foreign", "--samples.unguided --other_data"),
        ("samples.unguided", "small", "--samples.unguided (1, 4, 4)"),
        ("samples.unguided", "nowhere", "no samples folder"),
        ("samples.heldout", "foreign", "--samples.heldout name is taken"),
        ("reference", "amg", "--reference amg"),
        ("false_positive_rate", 0.001, "cannot be calibrated on 600 images"),
        ("out", "full", "--out full"),
    ],
)
def test_bad_input_is_one_line(
    dataset, index, samples, bad, tmp_path, capsys, option, value, words
):
    options = {"dataset": dataset, "index": index, "out": tmp_path / "e"}
    options |= {"samples.unguided": samples["unguided"]}
    options[option] = bad / value if option.startswith(("index", "samples", "out")) else value
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *(f"--{name}={given}" for name, given in options.items())])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words.split())
    assert not (tmp_path / "e").exists()


def test_samples_of_another_dataset_may_be_named(dataset, index, bad):
    opened = open_inputs(dataset, index, {"oracle": bad / "foreign"}, "unguided", ("oracle",))
    assert list(opened.samples) == ["oracle"]


@pytest.mark.parametrize("mitigation, refuses", [("amg", True), ("none", False)])
def test_the_second_measure_has_not_steered(dataset, index, tmp_path, mitigation, refuses):
    """Guided by EfficientNet, judged by pixels: the second measure would be EfficientNet."""
    images = DatasetFolder(dataset).part("fit").images()[:20]
    folder = make_samples(
        tmp_path / "s", images, None, None, mitigation, index_features="efficientnet-lite0"
    )
    if refuses:
        with pytest.raises(ValueError, match="--samples.x .* steered"):
            open_inputs(dataset, index, {"x": folder}, "unguided", ())
    else:
        assert open_inputs(dataset, index, {"x": folder}, "unguided", ()).samples


# --- the report ---


@pytest.fixture(scope="session")
def page(evaluation):
    report(evaluation)
    return (evaluation / "report" / "index.html").read_text()


def test_the_page_is_self_contained(page):
    assert not re.search(r"https?://|//cdn|@import|<script|<link", page)
    assert "default-src 'none'" in page
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith(("data:", "#"))


def test_the_page_says_what_was_found(page, metrics):
    assert "<em>50.0 %</em> of the unguided samples copy a training image" in page
    assert "contains training images" in page
    assert page.count("data:image/png;base64,") == 3 * 12
    assert "× 64" in page
    assert "threshold λ" in page
    assert "noise of standard deviation 0.05" in page
    assert "memfree report --evaluation" in page
    assert page.count("<svg") == 3


def test_drawings_follow_the_page_and_do_not_share_names(page):
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    names = [set(re.findall(r'\bid="([^"]+)"', drawing)) for drawing in drawings]
    assert not names[0] & names[1] and not names[1] & names[2] and not names[0] & names[2]
    for drawing, known in zip(drawings, names, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', drawing)
        assert {a or b for a, b in used} <= known
        assert "var(--ink)" in drawing
        assert "#010203" not in drawing


def test_picture_for_the_readme(page, evaluation):
    from PIL import Image

    picture = Image.open(evaluation / "report" / "picture.png")
    assert picture.width > 1000
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (0xC2, 0x41, 0x2D) in colours  # the copies' frames
    assert (0x1D, 0x7A, 0x5F) in colours  # the others'


def test_a_damaged_evaluation_is_one_line(evaluation, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(evaluation, broken)
    (broken / "metrics.json").write_text("[{}]")
    with pytest.raises(SystemExit):
        main(["report", "--evaluation", str(broken)])
    assert "is not a list of metrics" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "--evaluation", str(tmp_path / "none")])
    assert "no evaluation folder" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["reference", "samples", "paired", "made_by", "dataset"])
def test_an_evaluation_whose_manifest_lacks_something_is_one_line(
    evaluation, tmp_path, capsys, field
):
    broken = tmp_path / "broken"
    shutil.copytree(evaluation, broken)
    manifest = read_manifest(broken, "evaluation")
    del manifest[field]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        main(["report", "--evaluation", str(broken)])
    error = capsys.readouterr().err
    assert f"{broken}/manifest.json cannot be used: manifest lacks {field}; run" in error


def test_an_index_of_embeddings_is_judged_by_pixels_as_well(dataset, samples, tmp_path):
    from memfree.guidance import EmbeddingSimilarity
    from memfree.retrieval import EfficientNetFeatures, Whitened

    data = DatasetFolder(dataset)
    features = Whitened.fit(EfficientNetFeatures(), data.part("fit").images(), batch_size=32)
    built = ReferenceIndex.build(dataset, features, batch_size=32)
    calibrate(built, EmbeddingSimilarity(), data.part("calibration").images())
    built.save(tmp_path / "index")
    opened = open_inputs(dataset, tmp_path / "index", samples, "unguided", ())
    subjects, second = measure_subjects(opened, 0.01, 256, Console(quiet=True))
    assert second.similarity.describe == {"extractor": "pixels"}
    unguided = subjects["unguided"]
    assert unguided.second_copy.mean() == 0.5
    assert unguided.found.copy.mean() == pytest.approx(0.5, abs=0.05)
    assert (unguided.found.sigma <= 1 + 1e-5).all()
