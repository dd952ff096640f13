"""A training that gets SIGTERM or USR1 saves, ends, and goes on to the very same model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from processes import start

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import DuplicationPlan, PartSizes
from memfree.models import DDPMModule
from memfree.slurm import requeue
from memfree.slurm.launcher import as_one_run, launched
from memfree.training.checkpoints import latest_checkpoint, step_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """47 records: three batches of at most 16 an epoch."""
    out = tmp_path_factory.mktemp("preemption") / "digits"
    parts = PartSizes(train=40, calibration=20, test=10, fit=10)
    prepare(out, parts=parts, plan=DuplicationPlan(images=1, factor=8), records_per_shard=20)
    return out


def options(folder, out, steps, *more):
    return [
        f"--config={ROOT / 'configs' / 'digits.yaml'}",
        f"--data.path={folder}",
        f"--out={out}",
        "--data.batch_size=16",
        "--model.network.block_out_channels=[8, 8]",
        "--model.network.attention=[false, true]",
        "--model.network.norm_num_groups=4",
        "--model.warmup_steps=2",
        f"--trainer.max_steps={steps}",
        "--trainer.log_every_n_steps=2",
        "--trainer.sample_grid_every_n_steps=0",
        "--trainer.accelerator=cpu",
        *more,
    ]


def state(out):
    return torch.load(latest_checkpoint(out / "checkpoints"), weights_only=True)


def assert_same(out, other):
    for name in ("state_dict", "current_model_state"):
        one, two = state(out)[name], state(other)[name]
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert pq.read_table(out / "exposures.parquet") == pq.read_table(other / "exposures.parquet")


@pytest.fixture
def ctrl_c():
    """Heed it, also where these tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def signalled(monkeypatch):
    """Have a signal sent in the middle of the batch of this number, counted over all epochs."""
    plain, calls = DDPMModule.training_step, []

    def arm(batch, number=signal.SIGTERM):
        calls.clear()

        def training_step(self, *args):
            calls.append(1)
            if len(calls) == batch:
                os.kill(os.getpid(), number)
            return plain(self, *args)

        monkeypatch.setattr(DDPMModule, "training_step", training_step)

    return arm


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_is_told_to_end_goes_on_to_the_same_model(
    accumulate, folder, tmp_path, signalled, ctrl_c, capsys
):
    """At every batch, the last of an epoch and the first of two accumulated ones among them."""
    more = ("--trainer.devices=1", f"--trainer.accumulate_grad_batches={accumulate}")
    whole = tmp_path / "whole"
    heard = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    before = [signal.getsignal(number) for number in heard]
    entry.run(train, options(folder, whole, 4, *more))
    for batch in (1, 2, 3, 4) if accumulate == 1 else (1, 2, 3):
        out = tmp_path / f"at-{batch}"
        number = {1: signal.SIGINT, 2: signal.SIGUSR1}.get(batch, signal.SIGTERM)
        signalled(batch, number)
        capsys.readouterr()
        if batch < 4:
            with pytest.raises(SystemExit) as exit_:
                entry.run(train, options(folder, out, 4, *more))
            assert exit_.value.code == 128 + number
            steps = step_of(latest_checkpoint(out / "checkpoints"))
            what = "interrupted" if number == signal.SIGINT else f"received {number.name}"
            line = f"memfree: {what}: saved step {steps}; the same command resumes from there"
            assert line in capsys.readouterr().err
            assert steps < 4 and not (out / "manifest.json").exists()
            signalled(0)
        # Told so in its last batch, it ends by itself.
        entry.run(train, options(folder, out, 4, *more))
        assert_same(out, whole)
        assert [signal.getsignal(number) for number in heard] == before


@pytest.mark.parametrize("in_a_job", [True, False])
def test_a_signal_in_the_last_step_is_passed_on_in_a_job(
    in_a_job, folder, tmp_path, signalled, monkeypatch
):
    """To whom had the signals before, who requeues; by then the last step is saved."""
    monkeypatch.setattr("memfree.training.checkpoints.job_id", lambda: "12" if in_a_job else None)
    out, passed_on = tmp_path / "m", []

    def before(number, _):
        saved = step_of(latest_checkpoint(out / "checkpoints"))
        passed_on.append((number, saved, (out / "manifest.json").exists()))

    more = ("--trainer.devices=1", "--trainer.max_epochs=1")
    signalled(3, signal.SIGUSR1)
    with requeue.handled(before):
        entry.run(train, options(folder, out, -1, *more))
        assert signal.getsignal(signal.SIGUSR1) is before
    assert passed_on == ([(signal.SIGUSR1, 3, False)] if in_a_job else [])
    assert (out / "manifest.json").exists()


@pytest.mark.slow
def test_two_processes_end_together(folder, tmp_path):
    """The first of them, which has started the other, gets the signal."""
    out = tmp_path / "m"
    more = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    more += ["--trainer.checkpoint_every_n_steps=5"]
    command = [sys.executable, str(ROOT / "train.py"), *options(folder, out, 100000, *more)]
    process = start(command, stderr=subprocess.PIPE)
    while latest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert error.count("received SIGTERM: saved step") == 1 and "Traceback" not in error
    steps = step_of(latest_checkpoint(out / "checkpoints"))
    assert f"saved step {steps};" in error


def asked(monkeypatch, state, returncode=0):
    """SLURM's programs replaced: what they were asked."""
    calls = []

    def run(command, **_):
        calls.append(command[0])
        output = state if command[0] == "squeue" else ""
        return subprocess.CompletedProcess(command, returncode, output, "no")

    monkeypatch.setattr(requeue.subprocess, "run", run)
    monkeypatch.setattr(requeue.time, "sleep", lambda _: None)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_PROCID", "0")
    return calls


def test_only_a_job_that_is_running_is_requeued(monkeypatch):
    calls = asked(monkeypatch, "RUNNING 1:00\n")
    assert requeue.requeue() is None
    assert calls == ["squeue", "scontrol"]
    calls = asked(monkeypatch, "COMPLETING 1:00\n")
    assert requeue.requeue() == "Slurm says that job 12 is COMPLETING"
    assert calls == ["squeue"]
    calls = asked(monkeypatch, "", returncode=1)
    assert "unknown" in requeue.requeue()
    assert calls == ["squeue"] * 3
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue.job_id() == "11_3"
    monkeypatch.delenv("SLURM_PROCID")
    assert requeue.requeue() == "this is not a Slurm job"


@pytest.mark.parametrize(
    ("left", "requeued"),
    [("1:59", False), ("3:00", False), ("3:01", True), ("1-00:00:00", True), ("UNLIMITED", True)],
)
def test_what_begins_again_is_not_requeued_at_its_time_limit(monkeypatch, left, requeued):
    """It would reach it every time; preempted long before, it is."""
    calls = asked(monkeypatch, f"RUNNING {left}\n")
    monkeypatch.delenv("MEMFREE_SIGNAL_SECONDS", raising=False)
    reason = requeue.requeue(goes_on=False)
    assert calls == (["squeue", "scontrol"] if requeued else ["squeue"])
    assert reason is None if requeued else "needs a longer time limit" in reason
    assert requeue.requeue(goes_on=True) is None
    monkeypatch.setenv("MEMFREE_SIGNAL_SECONDS", "600")
    asked(monkeypatch, "RUNNING 11:00\n")
    assert "longer" in requeue.requeue(goes_on=False)


def test_a_study_is_requeued_whatever_it_is_running(monkeypatch):
    asked(monkeypatch, "RUNNING 1:00\n")
    ends = []
    monkeypatch.setattr(requeue.os, "_exit", ends.append)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with requeue.requeued_when_warned(), requeue.requeued_when_warned(goes_on=False):
        calls = asked(monkeypatch, "RUNNING 1:00\n")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == ["squeue", "scontrol"] and ends == [128 + signal.SIGUSR1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("2", [requeue._TURN])])
def test_the_first_task_of_a_farm_requeues_the_job(monkeypatch, rank, waited):
    """The others follow, if the job is still there then: the first may have ended long before."""
    asked(monkeypatch, "RUNNING 1:00\n")
    four = {"SLURM_PROCID": rank, "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    for name, value in four.items():
        monkeypatch.setenv(name, value)
    ends, waits = [], []
    monkeypatch.setattr(requeue.os, "_exit", ends.append)
    with requeue.requeued_when_warned(), as_one_run(launched(), 1):
        calls = asked(monkeypatch, "RUNNING 1:00\n")
        monkeypatch.setattr(requeue.time, "sleep", lambda seconds: waits.append(seconds))
        os.kill(os.getpid(), signal.SIGUSR1)
    assert calls == ["squeue", "scontrol"] and waits == waited
    assert ends == [128 + signal.SIGUSR1]
