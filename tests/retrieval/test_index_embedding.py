"""`memfree index` with networks: in batches that are kept, by one process or two."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL

from memfree.cli.entry import main
from memfree.data import DatasetFolder
from memfree.folders.lock import WHOLE
from memfree.retrieval import ReferenceIndex, TimmFeatures, Whitened, embed
from memfree.retrieval.embed import EmbeddedParts, parts_folder

MODEL = "test_vit.r160_in1k"
TIMM = ["--features", "timm", "--extractor.model", MODEL]
CPU = ["--trainer.accelerator", "cpu", "--batch_size", "7"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    sizes = ["--parts.train", "60", "--parts.calibration", "100", "--parts.test", "10"]
    plan = ["--plan.images", "3", "--plan.factor", "4"]
    main(["prepare", "--out", str(out), *sizes, "--parts.fit", "60", *plan])
    return out


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "plain"
    main(["index", "--dataset", str(dataset), "--out", str(out), *TIMM, *CPU])
    return out


def failing(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["index", *map(str, args)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def files(folder):
    names = ("vectors.npy", "items.parquet", "conditions.parquet", "calibration.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_the_index_is_the_one_built_in_memory(dataset, plain):
    features = TimmFeatures(MODEL)
    built = ReferenceIndex.build(DatasetFolder(dataset), features, batch_size=7)
    index = ReferenceIndex.load(plain)
    assert torch.equal(index.vectors, built.vectors)
    assert index.keys == built.keys
    assert torch.equal(index.group, built.group)
    assert torch.equal(index.multiplicity, built.multiplicity)
    assert index.items.contents == built.items.contents
    assert index.items.conditions.equals(built.items.conditions)
    assert index.calibrations["cosine"]["count"] == 100
    assert tuple(index.image_shape) == (1, 8, 8)
    assert not parts_folder(plain).exists()


def test_a_run_that_fails_goes_on_where_it_stopped(dataset, plain, tmp_path, monkeypatch):
    out = tmp_path / "index"
    command = ["index", "--dataset", str(dataset), "--out", str(out), *TIMM, *CPU]
    write = EmbeddedParts.write

    def failing_write(self, batch, vectors, hashes):
        if batch == 3:
            raise ValueError("the power went")
        write(self, batch, vectors, hashes)

    monkeypatch.setattr(EmbeddedParts, "write", failing_write)
    with pytest.raises(SystemExit):
        main(command)
    assert not out.exists()
    (kept,) = parts_folder(out).iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [
        f"batch-{batch:08d}.safetensors" for batch in range(3)
    ]

    done = []

    def counting_write(self, batch, vectors, hashes):
        done.append(batch)
        write(self, batch, vectors, hashes)

    monkeypatch.setattr(EmbeddedParts, "write", counting_write)
    main(command)
    assert done == list(range(3, 9))
    assert files(out) == files(plain)
    assert not parts_folder(out).exists()


def test_parts_of_another_extractor_or_batch_are_not_taken(dataset, tmp_path):
    folder = DatasetFolder(dataset)
    made = [
        EmbeddedParts(tmp_path, features, folder, 60, batch_size).folder
        for features, batch_size in [
            (TimmFeatures(MODEL), 7),
            (TimmFeatures(MODEL, seed=1), 7),
            (TimmFeatures(MODEL, dtype="bfloat16"), 7),
            (TimmFeatures(MODEL), 8),
        ]
    ]
    assert len(set(made)) == 4


@pytest.mark.parametrize("whiten", [False, True])
def test_parts_make_the_same_bytes(dataset, tmp_path, capsys, monkeypatch, whiten):
    command = ["index", "--dataset", str(dataset), *TIMM, *CPU, "--whiten", str(whiten).lower()]
    whole, out = tmp_path / "whole", tmp_path / "index"
    main([*command, "--out", str(whole)])
    command += ["--out", str(out)]
    done = []
    write = EmbeddedParts.write

    def counting_write(self, batch, vectors, hashes):
        done.append(batch)
        write(self, batch, vectors, hashes)

    monkeypatch.setattr(EmbeddedParts, "write", counting_write)
    main([*command, "--part", "2/2"])
    assert done == [1, 3, 5, 7]
    assert "part 2/2 is embedded; 5 batches of others are not" in capsys.readouterr().out
    assert not out.exists()
    main([*command, "--part", "1/2"])
    assert sorted(done) == list(range(9))
    assert files(out) == files(whole)
    assert (out / "config.yaml").read_text().count("part: all") == 1
    assert not parts_folder(out).exists()
    capsys.readouterr()
    main([*command, "--part", "2/2"])  # as a job that was requeued at its very end
    assert f"{out} is finished" in capsys.readouterr().out
    assert len(done) == 9 and files(out) == files(whole)
    assert not parts_folder(out).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--part", "3/2"], "--part 3/2: pass all, or a part"),
        (["--part", "1/2", "--features", "pixels"], "--part needs --features of a network"),
        (["--part", "1/2", "--overwrite", "true"], "--part and --overwrite true exclude each oth"),
    ],
)
def test_parts_that_are_refused(dataset, tmp_path, capsys, more, message):
    given = ["--dataset", dataset, "--out", tmp_path / "index", *TIMM, *more]
    assert message in failing(capsys, *given)[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_named(dataset, tmp_path, capsys, monkeypatch):
    out = tmp_path / "index"
    monkeypatch.setattr(EmbeddedParts, "missing", lambda self, work=WHOLE: [])
    parts = EmbeddedParts(parts_folder(out), TimmFeatures(MODEL), DatasetFolder(dataset), 60, 7)
    parts.folder.mkdir(parents=True)
    parts.path(0).write_bytes(b"nothing")
    lines = failing(capsys, "--dataset", dataset, "--out", out, *TIMM, *CPU)
    assert "batch-00000000.safetensors is damaged" in lines[-1]


def test_whitening_is_fitted_once(dataset, tmp_path, monkeypatch):
    out = tmp_path / "index"
    command = ["index", "--dataset", str(dataset), "--out", str(out), *TIMM, *CPU]
    monkeypatch.setattr(embed, "EmbeddingModule", None)
    with pytest.raises(TypeError):
        main([*command, "--whiten", "true"])
    monkeypatch.undo()
    monkeypatch.setattr(Whitened, "fit", None)  # what was fitted is found again
    main([*command, "--whiten", "true", "--workers", "1"])
    index = ReferenceIndex.load(out)
    monkeypatch.undo()
    expected = Whitened.fit(
        TimmFeatures(MODEL), DatasetFolder(dataset).part("fit").images(), batch_size=7
    )
    assert torch.equal(index.features.projection, expected.projection)
    assert index.vectors.shape == (60, 20)


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(dataset, plain, tmp_path):
    out = tmp_path / "index"
    command = [
        str(Path(sys.executable).parent / "memfree"),
        *("index", "--dataset", str(dataset), "--out", str(out), *TIMM, *CPU),
        *("--trainer.devices", "2"),
    ]
    # One thread each, as the tests' own processes have.
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Reference index") == 1
    assert files(out) == files(plain)
    assert not parts_folder(out).exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(dataset, plain, tmp_path):
    out = tmp_path / "index"
    arguments = ["--dataset", str(dataset), "--out", str(out), *TIMM, *CPU]
    slowly = (
        "import sys, time\n"
        "from memfree.cli.entry import main\n"
        "from memfree.retrieval.embed import EmbeddedParts\n"
        "write = EmbeddedParts.write\n"
        "EmbeddedParts.write = lambda *given: (write(*given), time.sleep(0.5))\n"
        "main(['index', *sys.argv[1:]])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slowly, *arguments])
    deadline = time.monotonic() + 120
    while len(list(parts_folder(out).glob("*/batch-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in parts_folder(out).glob("*/batch-*")}
    assert 2 <= len(before) < 9 and not out.exists()
    main(["index", *arguments])
    assert files(out) == files(plain)


def test_latents_are_indexed_by_distance(dataset, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
    )
    vae.save_pretrained(tmp_path / "vae")
    options = ["--features", "latents", "--extractor.path", str(tmp_path / "vae"), *CPU]
    main(["index", "--dataset", str(dataset), "--out", str(tmp_path / "index"), *options])
    index = ReferenceIndex.load(tmp_path / "index")
    assert index.metric == "l2"
    assert index.vectors.shape == (60, 4 * 4 * 4)
    assert index.calibrations["nl2-k50-a0.5"]["count"] == 100
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert "decoded" in manifest["contains_training_data"]


def test_hashed_keys_are_written_with_a_salt(dataset, plain, tmp_path):
    out, salt = tmp_path / "index", tmp_path / "salt"
    options = [*TIMM, *CPU, "--hash_keys", "true", "--salt_file", str(salt)]
    main(["index", "--dataset", str(dataset), "--out", str(out), *options])
    index, named = ReferenceIndex.load(out), ReferenceIndex.load(plain)
    expected = named.hashed(salt.read_text().strip())
    assert index.keys == expected.keys
    assert torch.equal(index.vectors, named.vectors)
    assert index.calibrations == named.calibrations
    assert set(pq.read_table(out / "items.parquet")["shard"].to_pylist()) == {None}


def test_wrong_options_are_one_line(dataset, tmp_path, capsys):
    common = ["--dataset", dataset, "--out", tmp_path / "index"]
    for options, message in [
        (["--features", "sscd"], "--features sscd needs --extractor.path"),
        (["--features", "sscd", "--extractor.path", tmp_path / "no.pt"], "no.pt: No such file"),
        (["--features", "timm", "--extractor.model", "nothing"], "timm cannot make model"),
        (["--extractor.seed", "1"], "--extractor.seed does not apply to --features pixels"),
        (["--trainer.devices", "2"], "--trainer.* needs --features of a network"),
        (["--hash_keys", "true"], "--hash_keys true needs other --features: pixels show"),
        ([*TIMM, "--hash_keys", "true"], "needs --salt_file"),
        ([*TIMM, "--trainer.accelerator", "none"], "--trainer.accelerator none"),
        (["--features", "latents", "--whiten", "true"], "not for latents"),
    ]:
        (line,) = failing(capsys, *common, *options)
        assert message in line
    assert list(tmp_path.iterdir()) == []
