"""Jobs on a real Slurm: as without it, the same when they are interrupted, and arrays.

All in one file, which one process tests: there is one Slurm a machine.
"""

import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.csv as pcsv
import pytest
import yaml
from slurm_cluster import words
from trained_state import difference, trained_state

from memfree.training.checkpoints import latest_checkpoint, step_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


def assert_same_model(out, other):
    """Weights in training and their average, optimizer, schedule, losses and exposures."""
    assert difference(trained_state(out), trained_state(other)) is None
    steps = [json.loads((path / "manifest.json").read_text())["steps"] for path in (out, other)]
    assert steps[0] == steps[1]


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
    words = [sys.executable, "-c", "from memfree.cli.entry import main; main()", "submit", command]
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


def test_steps_of_one_job_are_runs_of_their_own(slurm, training, plain, tmp_path):
    """Two that work together beside each other, a task farm, and a submission from inside."""
    train = [sys.executable, str(ROOT / "train.py"), *training, "--trainer.max_steps=20"]
    memfree = [sys.executable, "-c", "from memfree.cli.entry import main; main()"]
    prepare = ["prepare", "--source=digits", "--out=submitted", "--slurm.logs=logs"]
    farm = f"{words(train)} --trainer.devices=1 --out=farm-$SLURM_PROCID"
    lines = [
        "#!/bin/bash",
        f"srun --exact -n2 {words([*train, '--trainer.devices=2', '--out=a'])} &",
        f"srun --exact -n2 {words([*train, '--trainer.devices=2', '--out=b'])} &",
        "wait",
        f"srun --exact -n2 bash -c {shlex.quote(farm)}",
        f"{words([*train, '--out=script'])}",  # one process, though the job has four tasks
        f"{words([*memfree, 'submit', *prepare])}",
    ]
    script, log = tmp_path / "job.sh", tmp_path / "log"
    script.write_text("\n".join(lines) + "\n")
    job = slurm.sbatch("-N1", "-n4", f"-o{log}", script, cwd=tmp_path)
    assert slurm.wait_to_end(job) == ("COMPLETED", 0), log.read_text()
    for out, processes in (("a", 2), ("b", 2), ("farm-0", 1), ("farm-1", 1), ("script", 1)):
        assert_same_model(tmp_path / out, plain(processes, 20))
        assert (tmp_path / out / "config.yaml").is_file()
    number = re.search(r"submitted job (\d+)", log.read_text())[1]
    assert slurm.wait_to_end(number) == ("COMPLETED", 0)
    assert (tmp_path / "submitted" / "manifest.json").is_file()


def test_two_nodes_are_requeued_by_a_signal(slurm, training, plain, tmp_path):
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("multi_node.sbatch", tmp_path, log, ntasks_per_node=1)
    options = [*training, f"--out={out}", "--trainer.max_steps=200"]
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    wait_for_step(out, 40)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait_to_end(job) == ("COMPLETED", 1), log.read_text()
    text = log.read_text()
    assert text.count("received SIGUSR1: saved step") == 1 and "the job is requeued" in text
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
    assert "received SIGTERM: saved step" in log.read_text()
    assert f"not requeued: Slurm says that job {job} is C" in log.read_text()


@pytest.mark.exhaustive
def test_a_training_goes_on_behind_its_time_limit(slurm, training, plain, tmp_path):
    """Two minutes, of which the last one is for saving."""
    log, out = tmp_path / "log", tmp_path / "m"
    script = slurm.template("one_gpu.sbatch", tmp_path, log, time="2:00", signal="USR1@60")
    options = [*training, f"--out={out}", "--trainer.max_steps=12000"]
    job = slurm.sbatch(f"--export=ALL,PYTHON={sys.executable}", script, ROOT / "train.py", *options)
    state, restarts = slurm.wait_to_end(job, 850)
    assert state == "COMPLETED" and restarts > 0, log.read_text()
    assert log.read_text().count("received SIGUSR1: saved step") == restarts
    assert_same_model(out, plain(1, 12000))


@pytest.fixture(scope="module")
def sampling(plain, tmp_path_factory):
    """Options of a sampling but --out, and the samples of one that was not disturbed."""
    named = {"model": plain(2, 200), "count": 60, "batch_size": 4, "steps": 150}
    words = [*(f"--{name}={value}" for name, value in named.items()), "--trainer.accelerator=cpu"]
    whole = tmp_path_factory.mktemp("sampling") / "whole"
    command = [sys.executable, ROOT / "sample.py", *words, f"--out={whole}", "--trainer.devices=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return words, images(whole)


def test_sampling_is_requeued_and_draws_what_is_missing(slurm, sampling, tmp_path):
    options, whole = sampling
    out = tmp_path / "s"
    options = [*options, f"--out={out}", "--slurm.logs=logs"]
    job, _ = submit(slurm, "sample", *options, cwd=tmp_path)
    end = time.monotonic() + 420
    while len(list(out.glob("samples-*.tar"))) < 2:
        assert time.monotonic() < end, slurm.state(job)
        time.sleep(0.02)
    slurm.run("scancel", "--signal=USR1", job)
    text = tmp_path / "logs" / job / f"{job}_0_log.out"
    assert slurm.wait_to_end(job) == ("COMPLETED", 1), text.read_text()
    assert "received SIGUSR1: the job is requeued" in text.read_text()
    assert images(out) == whole


def test_an_array_of_jobs_of_which_one_fails_fills_one_folder(slurm, sampling, tmp_path):
    options, whole = sampling
    out = tmp_path / "s"
    options = [*options, f"--out={out}", "--slurm.logs=logs"]
    setup = "--slurm.setup=['test $SLURM_ARRAY_TASK_ID != 1 || exit 3']"
    job, said = submit(slurm, "sample", *options, "--slurm.array=3", setup, cwd=tmp_path)
    assert "an array of 3 jobs, each of one task" in said
    ends = [slurm.wait_to_end(f"{job}_{element}") for element in range(3)]
    log = tmp_path / "logs" / f"{job}_2" / f"{job}_2_0_log.out"
    assert ends == [("COMPLETED", 0), ("FAILED", 0), ("COMPLETED", 0)], log.read_text()
    assert "part 3/3 is drawn" in log.read_text()
    assert not (out / "manifest.json").exists() and len(images(out)) == 40
    # What was submitted says how: the same command with the part that failed.
    again, _ = submit(slurm, "sample", *options, "--part=2/3", cwd=tmp_path)
    assert slurm.wait_to_end(again) == ("COMPLETED", 0)
    assert (out / "manifest.json").is_file() and images(out) == whole


def test_an_array_of_jobs_embeds_an_index(slurm, digits, tmp_path):
    options = [f"--dataset={digits}", "--features=efficientnet", "--batch_size=4"]
    options += ["--trainer.accelerator=cpu", "--slurm.logs=logs"]
    whole, out = tmp_path / "whole", tmp_path / "index"
    single, _ = submit(slurm, "index", *options, f"--out={whole}", cwd=tmp_path)
    job, _ = submit(slurm, "index", *options, f"--out={out}", "--slurm.array=3", cwd=tmp_path)
    for name in (single, *(f"{job}_{element}" for element in range(3))):
        assert slurm.wait_to_end(name) == ("COMPLETED", 0)
    for name in ("vectors.npy", "items.parquet", "calibration.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_an_array_of_jobs_does_a_study(slurm, training, tmp_path):
    network = {
        word.removeprefix("--"): yaml.safe_load(value)
        for word, value in (option.split("=", 1) for option in training)
        if word.startswith("--model.")
    }
    config = {
        "name": "trial",
        "grids": [{"conditioning": ["unconditional", "class"], "factor": [8]}],
        "training_seeds": [1],
        "subjects": {"unguided": {"mitigation": "none", "false_positive_rate": 0.1}},
        "duplicated": 1,
        "steps": 20,
        "count": 20,
        "options": {
            "prepare": {"parts.train": 40, "parts.calibration": 100, "parts.fit": 20},
            "train": {**network, "trainer.accelerator": "cpu"},
            "sample": {"trainer.accelerator": "cpu", "steps": 5},
            "evaluate": {"false_positive_rate": 0.1, "other_rates": [0.2]},
        },
    }
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(config))
    options = ["trial.yaml", "--out=study", "--slurm.logs=logs", "--slurm.array=2"]
    job, _ = submit(slurm, "study", *options, cwd=tmp_path)
    ends = [slurm.wait_to_end(f"{job}_{element}") for element in range(2)]
    logs = [(tmp_path / f"logs/{job}_{n}/{job}_{n}_0_log.out").read_text() for n in range(2)]
    assert ends == [("COMPLETED", 0)] * 2, logs
    # One of them has made the data set that both have, and the last one the tables.
    assert sum("Written: " in log for log in logs) >= 1
    rows = pcsv.read_csv(tmp_path / "study" / "trial.csv")
    assert {*rows["conditioning"].to_pylist()} == {"unconditional", "class"}


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
