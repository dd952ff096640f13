"""train.py on real digits: what it leaves behind, resuming, two processes, and refusals."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from processes import start

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import DuplicationPlan, PartSizes
from memfree.models import load_model
from memfree.training.checkpoints import latest_checkpoint, step_of

SCRIPT = Path(__file__).parents[2] / "train.py"
CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
SMALL = [
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.norm_num_groups=4",
    "--model.warmup_steps=2",
    "--trainer.log_every_n_steps=2",
    "--trainer.sample_grid_every_n_steps=5",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training digits, one of them 8 times: 47 records."""
    out = tmp_path_factory.mktemp("train") / "digits"
    parts = PartSizes(train=40, calibration=20, test=10, fit=10)
    prepare(out, parts=parts, plan=DuplicationPlan(images=1, factor=8), records_per_shard=20)
    return out


def options(folder, out, steps, *more):
    return [
        f"--config={CONFIG}",
        f"--data.path={folder}",
        f"--out={out}",
        "--data.batch_size=16",
        f"--trainer.max_steps={steps}",
        *SMALL,
        *more,
    ]


def run(folder, out, steps, *more):
    entry.run(train, options(folder, out, steps, "--trainer.devices=1", *more))


def refused(capsys, folder, out, steps, *more):
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(folder, out, steps, *more)
    assert exit_.value.code == 2
    error = [text for text in capsys.readouterr().err.splitlines() if "memfree: error" in text]
    assert len(error) == 1
    return error[0]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A model folder of 6 steps; do not change it."""
    out = tmp_path_factory.mktemp("model") / "m"
    run(folder, out, 6)
    return out


def weights(path):
    network = UNet2DModel.from_pretrained(path / "diffusers" / "unet", low_cpu_mem_usage=False)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_a_model_folder_is_complete(finished, folder):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "diffusers",
        "exposures.parquet",
        "logs",
        "manifest.json",
        "samples",
    }
    manifest = json.loads((finished / "manifest.json").read_text())
    data = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "model"
    assert manifest["steps"] == 6
    assert manifest["num_classes"] == 10
    assert manifest["image_shape"] == [1, 8, 8]
    assert manifest["dataset_hash"]
    stepping = {"precision": "32-true", "accumulate_grad_batches": 1, "gradient_clip_val": 1.0}
    assert manifest["identity"]["trainer"] == stepping
    assert {name: manifest[name] for name in stepping} == stepping
    assert data["kind"] == "dataset"
    # Two epochs of 47 records, in batches of at most 16.
    assert manifest["exposures"] == {"total": 94, "images_seen": 40, "largest": 16}
    exposures = pq.read_table(finished / "exposures.parquet").to_pydict()
    assert sum(exposures["exposures"]) == 94
    assert load_model(finished).denoiser.num_classes == 10


def test_exported_weights_are_the_averaged_ones(finished):
    path = latest_checkpoint(finished / "checkpoints")
    state = torch.load(path, weights_only=True)
    names = [name for name in state["state_dict"] if name.startswith("network.")]
    averaged = torch.cat([state["state_dict"][name].flatten() for name in names])
    trained = torch.cat([state["current_model_state"][name].flatten() for name in names])
    assert torch.equal(weights(finished), averaged)
    assert not torch.equal(weights(finished), trained)


def test_the_saved_configuration_replays_to_the_same_weights(finished, tmp_path):
    saved = finished / "config.yaml"
    assert yaml.safe_load(saved.read_text())["data"]["batch_size"] == 16
    entry.run(train, [f"--config={saved}", f"--out={tmp_path / 'again'}"])
    assert torch.equal(weights(tmp_path / "again"), weights(finished))


def test_the_same_command_again_does_nothing(finished, folder, capsys):
    names = ("manifest.json", "config.yaml")
    before = [(finished / name).read_bytes() for name in names]
    run(folder, finished, 6, "--trainer.log_every_n_steps=3", "--data.verify=true")
    assert "already trained" in capsys.readouterr().out
    assert [(finished / name).read_bytes() for name in names] == before


def test_other_models_and_data_are_refused(finished, folder, capsys, tmp_path_factory):
    before = (finished / "manifest.json").read_bytes()
    error = refused(capsys, folder, finished, 6, "--model.learning_rate=0.01")
    assert "learning_rate is 0.001 there and 0.01 here; use another --out, or --overw" in error
    assert "batch_size is 16 there and 8" in refused(
        capsys, folder, finished, 6, "--data.batch_size=8"
    )
    assert "6 steps there and --trainer.max_steps is 4" in refused(capsys, folder, finished, 4)
    assert "seed is 0 there and 1 here" in refused(capsys, folder, finished, 6, "--seed=1")
    for option, difference in (
        ("gradient_clip_val=0", "gradient_clip_val is 1.0 there and 0.0 here"),
        ("accumulate_grad_batches=2", "accumulate_grad_batches is 1 there and 2 here"),
        ("precision=bf16-mixed", "precision is '32-true' there and 'bf16-mixed' here"),
    ):
        error = refused(capsys, folder, finished, 6, f"--trainer.{option}")
        assert f"trainer.{difference}" in error
    other = tmp_path_factory.mktemp("other") / "digits"
    prepare(other, parts=PartSizes(train=20, calibration=20, test=10, fit=10), seed=3)
    assert "data.hash is" in refused(capsys, other, finished, 6)
    assert "holds 'dataset', not a model folder" in refused(capsys, folder, other, 6)
    assert (finished / "manifest.json").read_bytes() == before


def test_foreign_shards_are_known_by_their_address_and_options(folder, tmp_path, capsys):
    out = tmp_path / "m"
    stream = {"epoch_records": 40, "image_size": 8, "channels": 1, "num_classes": 10}
    more = [f"--data.stream.{name}={value}" for name, value in stream.items()]
    run(f"{folder}/*.tar", out, 2, *more)
    run(f"{folder}/*.tar", out, 3, *more)
    assert f"resuming from {out}" in capsys.readouterr().out
    error = refused(capsys, f"{folder}/*.tar", out, 3, *more, "--data.stream.shuffle_buffer=2")
    assert "data.stream.shuffle_buffer is 1000 there and 2 here" in error
    assert "data.path is" in refused(capsys, f"{folder}/train*.tar", out, 3, *more)


def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "m"
    assert "no dataset folder at" in refused(capsys, tmp_path / "nowhere", out, 2)
    assert "give --trainer.max_steps or --trainer.max_epochs" in refused(capsys, folder, out, -1)
    assert "--trainer.max_steps 0: give 1 or more, or -1" in refused(capsys, folder, out, 0)
    assert "--trainer.max_steps -2: give 1 or more" in refused(capsys, folder, out, -2)
    assert "--trainer.max_epochs 0: give 1" in refused(
        capsys, folder, out, -1, "--trainer.max_epochs=0"
    )
    assert "cannot be halved 4 times" in refused(
        capsys,
        folder,
        out,
        2,
        "--model.network.block_out_channels=[8, 8, 8, 8, 8]",
        "--model.network.attention=[false, false, false, false, false]",
    )
    assert not out.exists()
    out.write_text("")
    assert "is a file: name a folder" in refused(capsys, folder, out, 2)


def test_steps_of_more_batches_than_an_epoch_are_refused(folder, tmp_path, capsys, caplog):
    """An epoch has 3 batches: Lightning would step after 3, whatever number is given."""
    out = tmp_path / "m"
    for number in (4, 8):
        error = refused(capsys, folder, out, 2, f"--trainer.accumulate_grad_batches={number}")
        assert f"--trainer.accumulate_grad_batches {number}: an epoch has only 3 batches" in error
    assert not out.exists()
    run(folder, out, 2, "--trainer.accumulate_grad_batches=2")
    assert "adds up 1 of its 3 batches, not 2" in caplog.text
    caplog.clear()
    run(folder, tmp_path / "n", 2, "--trainer.accumulate_grad_batches=3")
    assert "adds up" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["accelerator=tpu"], "--trainer.accelerator tpu --trainer.devices 1: "),
        (["devices=0"], "--trainer.devices 0: Trainer(devices=0) value is not a valid input"),
        (["devices=0,1"], "--trainer.devices 0,1: devices selected with CPUAccelerator"),
        (["strategy=dpp"], "--trainer.strategy dpp: You selected an invalid strategy name"),
        pytest.param(
            ["accelerator=gpu", "devices=auto"],
            "error: --trainer.accelerator gpu: No supported gpu backend found!",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_devices_that_are_not_there_are_one_line(
    folder, finished, tmp_path, capsys, options, message
):
    """Before anything is written, or a model that stands there deleted."""
    out = tmp_path / "m"
    more = [f"--trainer.{option}" for option in options]
    error = refused(capsys, folder, out, 2, *more)
    assert message in error
    assert "`" not in error and "http" not in error
    assert not out.exists()
    before = sorted(finished.rglob("*"))
    refused(capsys, folder, finished, 6, *more, "--seed=1", "--overwrite=true")
    assert sorted(finished.rglob("*")) == before


def test_the_last_line_says_what_was_done(folder, tmp_path, capsys):
    run(folder, tmp_path / "m", 3)
    last = capsys.readouterr().out.splitlines()[-1]
    with open(tmp_path / "m" / "logs" / "version_0" / "metrics.csv") as file:
        loss = float([row for row in csv.DictReader(file) if row["loss"]][-1]["loss"])
    assert last == f"{tmp_path / 'm'}: trained 3 steps, loss {loss:.3g}"


def test_interrupt_is_one_line_and_the_same_command_resumes(folder, tmp_path, capsys):
    out = tmp_path / "m"
    more = ["--trainer.devices=1", "--trainer.checkpoint_every_n_steps=20"]
    command = [sys.executable, str(SCRIPT), *options(folder, out, 4000, *more)]
    process = start(command, stderr=subprocess.PIPE)
    while latest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    saved = step_of(latest_checkpoint(out / "checkpoints"))
    line = f"memfree: interrupted: saved step {saved}; the same command resumes from there"
    assert error.splitlines()[-1] == line
    assert error.count("interrupt") == 1 and "Traceback" not in error
    steps = saved + 1
    run(folder, out, steps, more[1])
    assert f"trained {steps} steps" in capsys.readouterr().out


def test_overwrite_starts_again(folder, tmp_path):
    run(folder, tmp_path, 2)
    first = weights(tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    run(folder, tmp_path, 2, "--seed=1", "--overwrite=true")
    assert json.loads((tmp_path / "manifest.json").read_text())["identity"]["seed"] == 1
    assert not torch.equal(weights(tmp_path), first)
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_loss_that_is_nan_is_one_line(folder, tmp_path, capsys):
    error = refused(
        capsys, folder, tmp_path / "m", 9, "--model.learning_rate=1e30", "--model.warmup_steps=0"
    )
    assert "became NaN or infinite" in error
    assert not (tmp_path / "m" / "manifest.json").exists()
    assert not (tmp_path / "m" / "diffusers").exists()


def test_a_killed_run_resumes_to_the_same_weights(folder, finished, tmp_path):
    """SIGKILL between two checkpoints, then the same command."""
    out = tmp_path / "m"
    command = [sys.executable, str(SCRIPT), *options(folder, out, 6, "--trainer.devices=1")]
    slow = "--trainer.checkpoint_every_n_steps=1"
    process = start([*command, slow], stderr=subprocess.PIPE)
    while latest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    stopped = step_of(checkpoint)
    assert not (out / "manifest.json").exists() or stopped == 6
    run(folder, out, 6, slow)
    assert torch.equal(weights(out), weights(finished))
    assert pq.read_table(out / "exposures.parquet") == pq.read_table(finished / "exposures.parquet")


def test_two_processes_train_one_model(folder, tmp_path):
    out = tmp_path / "m"
    command = [
        sys.executable,
        str(SCRIPT),
        *options(folder, out, 4, "--trainer.devices=2", "--trainer.strategy=ddp"),
        "--data.batch_size=8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["devices"] == 2
    assert manifest["steps"] == 4
    # An epoch is three batches a rank of 7 or 8 records; the fourth step is of the second.
    assert manifest["exposures"]["images_seen"] == 40
    assert 47 + 14 <= manifest["exposures"]["total"] <= 47 + 16
    load_model(out)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        entry.run(train, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Train a diffusion model and save it as a diffusers folder.",
        "The same command again resumes from the newest checkpoint",
        "--out OUT Model folder to write: checkpoints, logs, sample grids",
        "--model.learning_rate LEARNING_RATE Highest learning rate of AdamW",
        "--model.noise.prediction_type {epsilon,v_prediction} Whether the network predicts",
        "--trainer.max_steps MAX_STEPS Total optimizer steps; -1: as many as max_epochs needs.",
        "--data.batch_size BATCH_SIZE Largest number of records in a batch on each rank",
    ):
        assert words in text
    options_ = [part for part in text.split(" --")[1:] if "(type: " in part or "required" in part]
    unexplained = [part.split()[0] for part in options_ if part.split("(")[0].count(" ") < 4]
    assert len(options_) > 40
    assert not unexplained


def test_two_processes_say_once_that_a_loss_is_nan(folder, tmp_path):
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.learning_rate=1e30"]
    command = [sys.executable, str(SCRIPT), *options(folder, tmp_path / "m", 9, *more)]
    command += ["--data.batch_size=8", "--model.warmup_steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("memfree: error") == 1
    assert "became NaN or infinite" in done.stderr
    assert not (tmp_path / "m" / "manifest.json").exists()
