"""`memfree index` on real digits, and what it says when something is wrong."""

import json
import shutil

import numpy as np
import pytest
import torch

from memfree.cli.entry import main
from memfree.data import DatasetFolder
from memfree.guidance.calibration import Calibration
from memfree.retrieval import ReferenceIndex


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    main(["prepare", "--out", str(out), "--plan.images", "8", "--plan.factor", "16"])
    return out


@pytest.fixture(scope="module")
def index_folder(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "pixels"
    main(["index", "--dataset", str(dataset), "--out", str(out)])
    return out


def failing(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["index", *map(str, args)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("memfree: error: ")
    return lines[0]


def test_rows_are_the_distinct_training_images(dataset, index_folder):
    index = ReferenceIndex.load(index_folder)
    part = DatasetFolder(dataset).part("train")
    assert index.keys == part.keys
    assert torch.equal(index.vectors, part.images().flatten(1))
    assert torch.equal(index.multiplicity, part.copies)
    assert sorted(index.multiplicity.tolist())[-9:] == [1] + [16] * 8
    assert torch.equal(index.labels, part.labels)
    assert torch.equal(index.label_counts.sum(1), index.multiplicity)
    assert index.dataset_hash == DatasetFolder(dataset).hash
    assert all(shard.startswith("train-") for shard in index.items.shards)


def test_thresholds_are_those_of_the_calibration_images(dataset, index_folder):
    index = ReferenceIndex.load(index_folder)
    calibration = Calibration.from_json(index.calibrations["nl2-k50-a0.5"])
    held_out = DatasetFolder(dataset).part("calibration").images().flatten(1).double().numpy()
    references = index.vectors.double().numpy()
    group = index.group.numpy()
    expected = []
    for image in held_out:
        distances = np.sqrt(((references - image) ** 2).sum(1))
        nearest = np.full(group.max() + 1, np.inf)
        np.minimum.at(nearest, group, distances)
        nearest = np.sort(nearest)[:50]
        expected.append(-nearest[0] / (0.5 * nearest.mean()))
    assert np.abs(np.sort(expected) - calibration.sigmas.numpy()).max() < 1e-5
    assert -0.75 < calibration.threshold(0.01) < -0.55


def test_the_table_names_what_was_found(dataset, index_folder, tmp_path, capsys):
    main(["index", "--dataset", str(dataset), "--out", str(tmp_path / "index")])
    shown = capsys.readouterr().out
    for text in ("training records", "620", "up to 16", "5 %", "1 %", "0.833 %", "nl2-k50-a0.5"):
        assert text in shown, text


def test_efficientnet_features_are_whitened_on_the_fit_part(tmp_path):
    small, out = tmp_path / "small", tmp_path / "index"
    sizes = ["--parts.train", "40", "--parts.calibration", "100", "--parts.test", "10"]
    main(["prepare", "--out", str(small), *sizes, "--parts.fit", "60"])
    options = ["--features", "efficientnet", "--whiten", "true", "--batch_size", "50"]
    main(["index", "--dataset", str(small), "--out", str(out), *options])
    index = ReferenceIndex.load(out)
    assert index.metric == "cosine"
    assert index.vectors.shape == (40, 20)
    assert index.calibrations["cosine"]["count"] == 100
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["features"]["base"]["name"] == "efficientnet-lite0"
    assert "features computed from training images" in manifest["contains_training_data"]


def test_an_index_of_something_else_is_kept(dataset, index_folder, tmp_path, capsys):
    out = tmp_path / "index"
    shutil.copytree(index_folder, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "dataset_hash": "another"}))
    line = failing(capsys, "--dataset", dataset, "--out", out)
    assert "another dataset" in line
    assert ReferenceIndex.load(out).dataset_hash == "another"
    main(["index", "--dataset", str(dataset), "--out", str(out), "--overwrite", "true"])
    assert ReferenceIndex.load(out).dataset_hash == DatasetFolder(dataset).hash


def test_bad_input_is_one_line(dataset, index_folder, tmp_path, capsys):
    out = tmp_path / "index"
    assert "no dataset folder" in failing(capsys, "--dataset", tmp_path / "no", "--out", out)
    assert "--batch_size: Not of type PositiveInt" in failing(
        capsys, "--dataset", dataset, "--out", out, "--batch_size", "0"
    )
    assert "--features efficientnet" in failing(
        capsys, "--dataset", dataset, "--out", out, "--whiten", "true"
    )
    assert "holds 'index'" in failing(capsys, "--dataset", index_folder, "--out", out)
    (tmp_path / "unfinished").mkdir()
    assert "not a finished dataset" in failing(
        capsys, "--dataset", tmp_path / "unfinished", "--out", out
    )
    assert not out.exists()


def test_no_held_out_data_is_said(tmp_path, capsys):
    parts = ["--parts.train", "1797", "--parts.calibration", "0", "--parts.test", "0"]
    main(["prepare", "--out", str(tmp_path / "all"), *parts, "--parts.fit", "0"])
    capsys.readouterr()
    line = failing(capsys, "--dataset", tmp_path / "all", "--out", tmp_path / "index")
    assert "no calibration images" in line
    assert not (tmp_path / "index").exists()
