"""Trainings on a real Slurm: as without it, and the same when they are interrupted."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from memfree.models.checkpoints import latest_checkpoint, step_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


def assert_same_model(out, other):
    """Weights in training and their average, optimizer, schedule and exposures, bit for bit."""
    states = [
        torch.load(latest_checkpoint(path / "checkpoints"), weights_only=True)
        for path in (out, other)
    ]
    for name in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "loops"):
        assert_equal(*(state[name] for state in states), name)
    tables = [pq.read_table(path / "exposures.parquet") for path in (out, other)]
    assert tables[0] == tables[1]
    steps = [json.loads((path / "manifest.json").read_text())["steps"] for path in (out, other)]
    assert steps[0] == steps[1]


def assert_equal(one, other, name):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{name}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    else:
        assert one == other, name


def wait_for_step(out, step, seconds=420):
    """Wait until a checkpoint of this step or a later one is there."""
    end = time.monotonic() + seconds
    while True:
        checkpoint = latest_checkpoint(out / "checkpoints") if out.exists() else None
        if checkpoint is not None and step_of(checkpoint) >= step:
            return step_of(checkpoint)
        assert time.monotonic() < end, f"no step {step} in {out}"
        time.sleep(0.02)


def submit(slurm, command, *options, cwd):
    """`memfree submit`; the number of the job and what was printed."""
    words = [sys.executable, "-c", "from memfree.cli import main; main()", "submit", command]
    done = slurm.run(*words, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[2].rstrip(":"), done.stdout


def test_two_tasks_of_a_node_train_as_two_processes(slurm, training, plain, tmp_path):
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("multi_node.sbatch", tmp_path, log, nodes=1, ntasks_per_node=2)
    options = [*training, f"--out={out}", "--trainer.max_steps=200"]
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    assert slurm.wait_to_end(job) == ("COMPLETED", 0), log.read_text()
    assert json.loads((out / "manifest.json").read_text())["devices"] == 2
    assert_same_model(out, plain(2, 200))


def test_two_nodes_are_requeued_by_a_signal(slurm, training, plain, tmp_path):
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("multi_node.sbatch", tmp_path, log, ntasks_per_node=1)
    options = [*training, f"--out={out}", "--trainer.max_steps=200"]
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    wait_for_step(out, 40)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait_to_end(job) == ("COMPLETED", 1), log.read_text()
    text = log.read_text()
    assert text.count("SIGUSR1 came: saved step") == 1 and "the job is requeued" in text
    assert text.count("resuming from") == 1 and "Traceback" not in text
    assert_same_model(out, plain(2, 200))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_a_training_survives_preemptions(times, slurm, training, plain, tmp_path):
    """By a job of a higher partition, by a warning, and by SIGTERM while the job may go on."""
    out, steps = tmp_path / "m", 100 + 100 * times
    options = [*training, f"--out={out}", f"--trainer.max_steps={steps}"]
    job, said = submit(
        slurm, "train", *options, "--slurm.partition=main", "--slurm.logs=logs", cwd=tmp_path
    )
    assert f"squeue --jobs {job}" in said
    log = tmp_path / "logs" / job / f"{job}_0_log.out"
    stopped = [0]
    for number in range(times):
        wait_for_step(out, stopped[-1] + 20)
        if number % 3 == 0:
            high = slurm.sbatch("-phigh", "-N2", "-n8", f"-o{tmp_path}/high", "--wrap=sleep 1")
            slurm.wait_to_end(high)
        else:
            slurm.run("scancel", f"--signal={'USR1' if number % 3 == 1 else 'TERM'}", job)
        slurm.wait(job, lambda _, restarts, number=number: restarts == number + 1)
        stopped.append(step_of(latest_checkpoint(out / "checkpoints")))
    assert slurm.wait_to_end(job) == ("COMPLETED", times), log.read_text()
    text = log.read_text()
    assert text.count("the job is requeued") == times, text
    assert text.count("resuming from") == times and "Traceback" not in text
    assert stopped == sorted(set(stopped)) and stopped[-1] < steps
    assert_same_model(out, plain(1, steps))
    ends = ("submission.sh", "submitted.pkl", "0_result.pkl", "0_log.out")
    assert {path.name for path in log.parent.iterdir()} == {f"{job}_{end}" for end in ends}


def test_a_cancelled_training_is_saved_and_stays_cancelled(slurm, training, tmp_path):
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("one_gpu.sbatch", tmp_path, log)
    options = [*training, f"--out={out}", "--trainer.max_steps=100000"]
    options.append("--trainer.checkpoint_every_n_steps=30")
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    wait_for_step(out, 30)
    slurm.run("scancel", job)
    assert slurm.wait_to_end(job) == ("CANCELLED", 0)
    assert "SIGTERM came: saved step" in log.read_text()
    assert f"not requeued: SLURM says that job {job} is C" in log.read_text()


@pytest.mark.exhaustive
def test_a_training_goes_on_behind_its_time_limit(slurm, training, plain, tmp_path):
    """Two minutes, of which the last one is for saving."""
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("one_gpu.sbatch", tmp_path, log, time="2:00", signal="USR1@60")
    options = [*training, f"--out={out}", "--trainer.max_steps=12000"]
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    state, restarts = slurm.wait_to_end(job, 850)
    assert state == "COMPLETED" and restarts > 0, log.read_text()
    assert log.read_text().count("SIGUSR1 came: saved step") == restarts
    assert_same_model(out, plain(1, 12000))


def test_sampling_is_requeued_and_draws_what_is_missing(slurm, plain, tmp_path):
    def options(out):
        named = {"model": plain(2, 200), "out": out, "count": 60, "batch_size": 4, "steps": 150}
        words = [f"--{name}={value}" for name, value in named.items()]
        return [*words, "--trainer.accelerator=cpu"]

    out, whole = tmp_path / "s", tmp_path / "whole"
    job, _ = submit(slurm, "sample", *options(out), "--slurm.logs=logs", cwd=tmp_path)
    end = time.monotonic() + 420
    while len(list(out.glob("samples-*.tar"))) < 2:
        assert time.monotonic() < end, slurm.state(job)
        time.sleep(0.02)
    slurm.run("scancel", "--signal=USR1", job)
    command = [sys.executable, ROOT / "sample.py", *options(whole), "--trainer.devices=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = tmp_path / "logs" / job / f"{job}_0_log.out"
    assert slurm.wait_to_end(job) == ("COMPLETED", 1), text.read_text()
    assert "SIGUSR1 came: the job is requeued" in text.read_text()
    assert images(out) == images(whole)


def images(folder):
    """Members of all shards by name, PNG only."""
    found = {}
    for shard in sorted(folder.glob("samples-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    assert member.name not in found
                    found[member.name] = tar.extractfile(member).read()
    return found
