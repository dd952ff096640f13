"""memfree submit without a Slurm: what is checked, what the script says, what the job runs."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from jsonargparse.typing import PositiveInt
from rich.console import Console
from submitit.core.utils import DelayedSubmission

from memfree.cli import entry
from memfree.cli.stages import Stage, run_stages
from memfree.commands.submit import (
    SlurmOptions,
    Submission,
    outside_of_job,
    run_in_job,
    submission_of,
)

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN = [f"--config={CONFIGS / 'digits.yaml'}"]
PRESETS = sorted((CONFIGS / "slurm").glob("*.yaml"))


def refused(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        entry.main(["submit", *words])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_script_asks_for_what_the_options_say():
    slurm = SlurmOptions(
        partition="gpu",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        mem="64G",
        time="24:00:00",
        signal_seconds=60,
        setup=["module load cuda"],
        extra={"gres": "gpu:a100:4"},
        logs=Path("/logs"),
    )
    lines = Submission("train", "", slurm).script().splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert asked >= {
        "partition=gpu",
        "nodes=2",
        "gpus-per-node=4",
        "ntasks-per-node=4",
        "cpus-per-task=8",
        "mem=64G",
        "time=24:00:00",
        "signal=USR1@60",
        "requeue",
        "open-mode=append",
        "gres=gpu:a100:4",
        "job-name=memfree-train",
        "output=/logs/%j/%j_0_log.out",
    }
    setup = lines.index("module load cuda")
    assert lines.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK") < setup + 2
    assert lines[-2].startswith("srun ") or any(line.startswith("srun ") for line in lines[setup:])


def test_what_is_not_given_is_left_to_the_cluster():
    script = Submission("train", "", SlurmOptions(logs=Path("/logs"))).script()
    assert "--time" not in script and "--wckey" not in script
    assert "export MEMFREE_SIGNAL_SECONDS=120" in script


SAMPLE = ["--model=m", "--out=o"]


def test_an_array_is_one_script_and_a_part_for_each_job(tmp_path, monkeypatch, capsys):
    options = ["--slurm.array=4", "--slurm.array_parallelism=2"]
    submission, _ = submission_of("sample", [*SAMPLE, *options])
    script = submission.script()
    assert "#SBATCH --array=0-3%2" in script
    assert submission.parts == ["1/4", "2/4", "3/4", "4/4"]
    assert submission.log("7").name == "7_0_0_log.out"
    ran = []
    monkeypatch.setattr(
        "memfree.cli.stages.run_command", lambda name, words, **_: ran.append(words)
    )
    run_in_job("sample", "a.yaml", str(tmp_path), "3/4")
    assert ran == [["--config=a.yaml", "--part=3/4"]]
    entry.main(["submit", "sample", *SAMPLE, *options, "--dry_run=true"])
    assert "# with --part 1/4 to 4/4, one a job" in capsys.readouterr().out


@pytest.mark.parametrize("status", [None, 0, 3])
def test_a_job_ends_with_the_status_of_its_command(tmp_path, monkeypatch, status):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memfree.cli.stages.run_command", lambda *_, **__: status)
    with pytest.raises(SystemExit) if status else nullcontext() as exit_:
        run_in_job("audit", "a.yaml", str(tmp_path))
    assert not status or exit_.value.code == status
    run_stages([Stage("audit")] * 2, Console(quiet=True))  # goes on


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *TRAIN], "--slurm.array 2: train has no parts"),
        (["sample", *SAMPLE, "--part=1/2"], "--slurm.array 2 gives each job its part: leave --pa"),
        (["index", "--dataset=d", "--out=o"], "--slurm.array 2: an index of pixels has no parts"),
    ],
)
def test_what_has_no_parts_is_no_array(words, message, capsys):
    assert message in refused(capsys, *words, "--slurm.array=2")


def test_the_job_reads_a_configuration_that_later_edits_do_not_change(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  max_steps: 7\nslurm:\n  nodes: 2\n  gpus_per_node: 4\n")
    submission, dry = submission_of("train", [*TRAIN, f"--config={mine}", "--dry_run=true"])
    assert dry
    config = yaml.safe_load(submission.configuration)
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["devices"] == 4 and config["trainer"]["num_nodes"] == 2
    assert "slurm" not in config and "dry_run" not in config and "config" not in config
    file = tmp_path / "whole.yaml"
    file.write_text(submission.configuration)
    with pytest.raises(SystemExit) as exit_:
        entry.run_command("train", [f"--config={file}", "--print_config"])
    assert exit_.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == config
    assert submission.path.name.startswith("train-")


def test_a_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    entry.main(["submit", "train", *TRAIN, "--dry_run=true", "--slurm.time=1-12"])
    text = capsys.readouterr().out
    assert "#SBATCH --time=1-12" in text
    assert "# every task runs: python train.py --config=" in text
    assert "#       block_out_channels:" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_stps=3"], "unknown option --trainer.max_stps, did you mean"),
        (["--slurm.nods=3"], "unknown option --slurm.nods, did you mean --slurm.nodes?"),
        (["--slurm.nodes=0"], "--slurm.nodes: "),
        (["--slurm.time=soon"], "--slurm.time soon: give minutes"),
        (["--slurm.job_name=bash"], "--slurm.job_name bash: Lightning takes"),
        (["--slurm.logs=a%j"], "--slurm.logs a%j: name a folder without %"),
        (["--data.batch_size=0"], "--data.batch_size 0: use 1 or more"),
        (
            ["--trainer.devices=3", "--slurm.gpus_per_node=4"],
            "--trainer.devices 3 contradicts --slurm.gpus_per_node 4: leave --trainer.devices out",
        ),
        (["--trainer.num_nodes=3"], "--trainer.num_nodes 3 contradicts --slurm.nodes 1"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_submitted(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Submission, "submit", lambda self: pytest.fail("submitted"))
    assert message in refused(capsys, "train", *TRAIN, *words)
    assert not list(tmp_path.iterdir())


def test_commands_of_one_process_and_unknown_ones_are_refused(capsys):
    study = [f"--config={CONFIGS / 'study' / 'oracle.yaml'}", "--slurm.nodes=2"]
    assert "--slurm.nodes 2: study is one process" in refused(capsys, "study", *study)
    assert "unknown command 'tran', did you mean train?" in refused(capsys, "tran")
    entry.main(["submit", "--help"])
    assert "usage: memfree submit COMMAND" in capsys.readouterr().out


def test_without_slurm_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert "there is no SLURM here (no command srun)" in refused(capsys, "train", *TRAIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_accepted(path):
    submission, _ = submission_of("train", [*TRAIN, f"--config={path}"])
    given = yaml.safe_load(path.read_text())["slurm"]
    assert {name: getattr(submission.slurm, name) for name in given} == given
    assert "#SBATCH --signal=USR1@" in submission.script()


def test_what_is_pickled_is_a_name_and_strings(tmp_path):
    file = tmp_path / "x.pkl"
    DelayedSubmission(run_in_job, "train", "a.yaml", "/folder").dump(file)
    data = file.read_bytes()
    assert b"memfree.commands.submit" in data and b"run_in_job" in data
    # by name: no code of ours is in it
    assert b"co_code" not in data and b"_make_function" not in data


def test_numbers_of_the_configuration_are_plain():
    submission, _ = submission_of("train", [*TRAIN, "--slurm.tasks_per_node=2"])
    assert isinstance(submission.slurm.nodes, (int, PositiveInt))
    assert "!!python" not in submission.configuration


OF_THE_JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_TRES_PER_TASK": "cpu:1",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_NTASKS": "1",
    "SRUN_CPUS_PER_TASK": "1",
    "SBATCH_CPU_BIND": "quiet,mask_cpu:0x1",
    "SBATCH_MEM_BIND": "none",
    "SUBMITIT_EXECUTOR": "slurm",
    "CUDA_VISIBLE_DEVICES": "3",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "node7",
    "NODE_RANK": "0",
    "OMPI_COMM_WORLD_RANK": "0",
}
OF_THE_USER = {
    "SLURM_CONF": "/somewhere/slurm.conf",
    "SLURM_CLUSTERS": "one",
    "SBATCH_ACCOUNT": "mine",
    "HF_HUB_OFFLINE": "1",
}


@pytest.mark.parametrize("array", [1, 2])
def test_a_job_is_told_nothing_of_the_job_that_submits_it(tmp_path, monkeypatch, array):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in (
        ("srun", ""),
        ("sbatch", f"env > {tmp_path}/env; echo Submitted batch job 7"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {**OF_THE_JOB, **OF_THE_USER}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    slurm = SlurmOptions(logs=tmp_path / "logs", array=PositiveInt(array))
    assert Submission("sample", "", slurm).submit() == "7"
    assert dict(os.environ) == before
    lines = (tmp_path / "env").read_text().splitlines()
    passed = dict(line.split("=", 1) for line in lines if "=" in line)
    assert not OF_THE_JOB.keys() & passed.keys()
    assert OF_THE_USER.items() <= passed.items()


def test_outside_of_a_job_the_environment_is_the_users(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_CPU_BIND", "none")
    with outside_of_job():
        assert os.environ["SLURM_CPU_BIND"] == "none"
