"""Commands under srun, torchrun, mpirun and pods: one run together, or one run each."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_only

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.data import PartSizes
from memfree.folders.lock import one_writer
from memfree.slurm.launcher import as_one_run, is_launchers, launched
from memfree.training.trainer import build_trainer, device_count

ROOT = Path(__file__).parents[2]
MEMFREE = [sys.executable, "-c", "from memfree.cli.entry import main; main()"]
ON_CPU = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
POD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}
TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NAME": "bash",
}
ONE_TASK = {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
TORCHRUN = {**POD, "TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ONE_OF_TORCHRUN = {
    **TORCHRUN,
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
LAUNCHES = [POD, TASK, OPEN_MPI, {"RANK": "1"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in [name for name in os.environ if is_launchers(name)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("launchers") / "digits"
    prepare(out, parts=PartSizes(train=40, calibration=20, test=10, fit=10))
    return out


def told(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def started(count, words, variables):
    """Processes of one launch; what each has said, and its status."""
    environment = {name: value for name, value in os.environ.items() if not is_launchers(name)}
    processes = [
        subprocess.Popen(
            [word.format(rank=rank) for word in words],
            env={
                **environment,
                **{name: value.format(rank=rank) for name, value in variables.items()},
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.mark.parametrize("variables", LAUNCHES, ids=lambda variables: "-".join(variables)[:20])
def test_a_run_of_a_task_farm_writes_all_of_its_folder(monkeypatch, digits, tmp_path, variables):
    told(monkeypatch, variables)
    out = tmp_path / "index"
    entry.main(["index", f"--dataset={digits}", f"--out={out}"])
    assert {"manifest.json", "config.yaml", "vectors.npy"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("variables", LAUNCHES, ids=lambda variables: "-".join(variables)[:20])
@pytest.mark.parametrize("command", ["index", "prepare", "study"])
def test_two_processes_of_a_launch_are_refused_a_folder(
    monkeypatch, digits, tmp_path, capsys, variables, command
):
    told(monkeypatch, variables)
    out = tmp_path / "out"
    words = {
        "index": [f"--dataset={digits}"],
        "prepare": ["--source=digits"],
        "study": [str(ROOT / "configs" / "study" / "oracle.yaml")],
    }
    with as_one_run(launched(), 1), one_writer(out):
        told(monkeypatch, variables)
        with pytest.raises(SystemExit) as exit_:
            entry.main([command, *words[command], f"--out={out}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process is writing to --out" in line and "started" in line
    assert not out.exists()


def test_a_report_without_out_has_one_writer(monkeypatch, tmp_path):
    module = importlib.import_module("memfree.commands.report")
    monkeypatch.setattr("memfree.evaluation.folder.EvaluationFolder", lambda folder: Mock())
    monkeypatch.setattr("memfree.evaluation.page.report_page", lambda folder: "")
    with one_writer(tmp_path / "report"), pytest.raises(ValueError, match="another process"):
        module.report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_four_processes_do_not_write_one_folder(digits, tmp_path):
    words = [*MEMFREE, "index", f"--dataset={digits}", f"--out={tmp_path / 'index'}"]
    words.append("--batch_size=1")
    ends = started(4, words, {**TASK, "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"})
    refused = [error for status, _, error in ends if status]
    assert len(refused) < 4
    for error in refused:
        assert len(error.splitlines()) == 1 and "srun started 4 processes" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", ""), ("LOCAL_RANK", "x"), ("SLURM_PROCID", "x"), ("RANK", "9")]
)
def test_a_spoilt_variable_is_one_line(digits, tmp_path, name, value):
    """In a process of its own: Lightning reads the variables when it is imported."""
    words = [sys.executable, str(ROOT / "sample.py"), "--model=none", f"--out={tmp_path / 'out'}"]
    variables = {name: value, **({"WORLD_SIZE": "4"} if value == "9" else {})}
    ((status, _, error),) = started(1, words, variables)
    assert status == 2 and f" {name} " in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "options", "environment", "world"),
    [
        ({}, {"devices": 1}, None, 1),
        (TASK, {"devices": 1}, None, 1),
        (TASK, {"devices": "auto"}, None, 1),
        (TASK, {"devices": 4}, SLURMEnvironment, 4),
        # One task with several devices: Lightning starts a process for each.
        (ONE_TASK, {"devices": 3}, LightningEnvironment, 3),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "12"}, {"devices": 2}, LightningEnvironment, 2),
        (POD, {"devices": 1, "num_nodes": 4}, TorchElasticEnvironment, 4),
        (OPEN_MPI, {"devices": 4}, TorchElasticEnvironment, 4),
        (TORCHRUN, {"devices": "auto"}, TorchElasticEnvironment, 4),
    ],
)
def test_the_world_is_what_the_options_say(monkeypatch, variables, options, environment, world):
    told(monkeypatch, variables)
    launch = launched()
    devices = device_count(launch, "cpu", options["devices"])
    with as_one_run(launch, devices, options.get("num_nodes", 1)):
        trainer = build_trainer(**ON_CPU, **options)
        found = getattr(trainer.strategy, "cluster_environment", None)
        assert (type(found) if found else None) == environment
        assert trainer.world_size == world


@pytest.fixture(autouse=True)
def _rank(monkeypatch):
    """What a test makes Lightning believe of this process's rank is undone."""
    monkeypatch.setattr(rank_zero_only, "rank", getattr(rank_zero_only, "rank", 0))


def test_a_run_by_itself_logs_and_saves(monkeypatch):
    """Lightning takes the rank from the environment when it is imported."""
    told(monkeypatch, POD)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert build_trainer(**ON_CPU, devices=1).is_global_zero
    assert rank_zero_only.rank == 0


@pytest.mark.parametrize(("devices", "said"), [(2, "--trainer.devices 4"), (4, "--gpus-per-node")])
def test_devices_that_do_not_fit_the_tasks_are_one_line(monkeypatch, devices, said):
    """Another number of tasks; and tasks that see one GPU each."""
    told(monkeypatch, TASK)
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 1))
    with pytest.raises(ValueError, match=f"--trainer.devices {devices}") as refusal:
        build_trainer(accelerator="gpu", devices=devices)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("variables", "devices", "inside"),
    [
        (ONE_OF_TORCHRUN, "auto", 1),
        (ONE_OF_TORCHRUN, "-1", 1),
        (TORCHRUN, "auto", 4),
        (ONE_TASK, "auto", "auto"),
    ],
)
def test_all_devices_are_those_that_torchrun_has_started(monkeypatch, variables, devices, inside):
    """Also once a run by itself has forgotten torchrun, and sees all GPUs."""
    told(monkeypatch, variables)
    config = Namespace(trainer=Namespace(accelerator="cpu", devices=devices, num_nodes=1))
    with entry._as_one_run(launched(), config):
        assert config["trainer.devices"] == inside


def test_lightning_alone_needs_a_port(monkeypatch):
    told(monkeypatch, {"MASTER_PORT": "tcp://10.0.0.1:80"})
    assert build_trainer(**ON_CPU, devices=1).world_size == 1
    with pytest.raises(ValueError, match="MASTER_PORT"):
        build_trainer(**ON_CPU, devices=2)


def test_submit_is_one_process(monkeypatch, capsys):
    told(monkeypatch, TASK)
    with pytest.raises(SystemExit) as exit_:
        entry.main(["submit", "prepare", "--source=digits", "--dry_run=true"])
    assert exit_.value.code == 2
    assert "srun started 4 processes" in capsys.readouterr().err


TRAINING = [
    f"--config={ROOT / 'configs' / 'digits.yaml'}",
    "--data.batch_size=8",
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.norm_num_groups=4",
    "--model.warmup_steps=2",
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=2",
    "--trainer.sample_grid_every_n_steps=0",
    "--trainer.accelerator=cpu",
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "pods", "mpirun"])
def test_two_processes_train_together(digits, tmp_path, launcher):
    out = tmp_path / "m"
    words = [str(ROOT / "train.py"), *TRAINING, f"--data.path={digits}", f"--out={out}"]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ends = started(1, [*torchrun, "--nproc-per-node=2", *words], {})
    else:
        words = [sys.executable, *words]
        words.append("--trainer.num_nodes=2" if launcher == "pods" else "--trainer.devices=2")
        variables = {
            "pods": {**POD, "RANK": "{rank}", "WORLD_SIZE": "2"},
            "mpirun": {
                **OPEN_MPI,
                "OMPI_COMM_WORLD_RANK": "{rank}",
                "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
        }
        ends = started(2, [word.replace("{", "{{") for word in words], variables[launcher])
    assert all(status == 0 for status, *_ in ends), ends
    assert json.loads((out / "manifest.json").read_text())["devices"] == 2


@pytest.mark.slow
def test_a_training_of_a_task_farm_is_that_of_a_single_process(digits, tmp_path):
    for variables, out in (({}, "alone"), (POD, "pod")):
        words = [sys.executable, str(ROOT / "train.py"), *TRAINING, f"--data.path={digits}"]
        ((status, _, error),) = started(1, [*words, f"--out={tmp_path / out}"], variables)
        assert status == 0, error
    files = [
        sorted(str(path.relative_to(tmp_path / out)) for path in (tmp_path / out).rglob("*"))
        for out in ("alone", "pod")
    ]
    assert files[0] == files[1]
    weights = "diffusers/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (tmp_path / "pod" / weights).read_bytes()
