"""The Slurm of this session, and what its jobs are compared with."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing_programs

from memfree.commands.prepare import prepare
from memfree.data import DuplicationPlan, PartSizes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm():
    """A real Slurm of two nodes; it is stopped after the last test, also when tests failed."""
    if missing := missing_programs():
        pytest.skip(
            f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge "
            "iproute2"
        )
    # One at a time on a machine: the nodes' names are in its /etc/hosts.
    lock = Path(tempfile.gettempdir()) / f"memfree-slurm-{os.getuid()}.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cluster = Cluster()
        try:
            if reason := cluster.start():
                pytest.skip(f"Slurm does not start here: {reason}")
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """40 training digits, one of them 8 times: 47 records."""
    out = tmp_path_factory.mktemp("slurm") / "digits"
    parts = PartSizes(train=40, calibration=20, test=10, fit=10)
    prepare(out, parts=parts, plan=DuplicationPlan(images=1, factor=8), records_per_shard=20)
    return out


@pytest.fixture(scope="session")
def training(digits):
    """Options of a small training, all but --out, its length and its devices."""
    return [
        f"--config={ROOT / 'configs' / 'digits.yaml'}",
        f"--data.path={digits}",
        "--data.batch_size=8",
        "--model.network.block_out_channels=[8, 8]",
        "--model.network.attention=[false, true]",
        "--model.network.norm_num_groups=4",
        "--model.warmup_steps=2",
        "--trainer.log_every_n_steps=10",
        "--trainer.checkpoint_every_n_steps=20",
        "--trainer.sample_grid_every_n_steps=0",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture(scope="session")
def plain(training, tmp_path_factory):
    """Train without Slurm and undisturbed: a function of processes and steps; the model folder."""
    made = {}

    def run(processes, steps):
        if (processes, steps) not in made:
            out = tmp_path_factory.mktemp("plain") / "m"
            command = [sys.executable, ROOT / "train.py", *training, f"--out={out}"]
            command += [f"--trainer.max_steps={steps}", f"--trainer.devices={processes}"]
            command += ["--trainer.strategy=ddp"] if processes > 1 else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made[processes, steps] = out
        return made[processes, steps]

    return run
