"""What a job asks SLURM for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import PositiveInt

from memfree.requeue import DEFAULT_SIGNAL_SECONDS, SIGNAL_SECONDS

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_NO_LIGHTNING = ("bash", "interactive")


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks SLURM for; names are those of ``sbatch``."""

    partition: str | None = None
    """Partition, or several separated by commas; the cluster's default otherwise."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each machine; each has a task, a process, of its own."""
    tasks_per_node: PositiveInt | None = None
    """Processes on each machine; by default one a GPU, or one."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of each process: its own one and those of its data workers."""
    mem: str | None = None
    """Memory of each machine, as 64G."""
    time: str | None = None
    """Time limit: minutes, hours:minutes:seconds or days-hours:minutes:seconds (in quotes in YAML);
    by default the partition's. A job that reaches it is requeued and goes on; prepare, evaluate,
    audit, tune and train-... begin again when they are stopped, and need a limit that suffices."""
    signal_seconds: PositiveInt = DEFAULT_SIGNAL_SECONDS
    """Seconds before the time limit, or before preemption where the cluster allows, at which the
    job is warned, saves and is requeued; SLURM is exact to half a minute."""
    array: PositiveInt = 1
    """Jobs that share the command's work out: sample, index of a network, or study. Each does its
    --part of it; the one that comes last finishes the folder."""
    array_parallelism: PositiveInt = 256
    """Jobs of an array that may run at the same time."""
    requeue: bool = True
    """Whether the job goes back into the queue when it is preempted or its machine fails."""
    constraint: str | None = None
    """Features that a machine must have."""
    exclude: str | None = None
    """Machines not to run on."""
    job_name: str | None = None
    """Name in the queue; by default memfree and the command."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the command, as [module load cuda]."""
    extra: dict[str, str] = field(default_factory=dict)
    """Any other option of sbatch by its name, as {gres: gpu:a100:4}."""
    logs: Path = Path("runs/slurm")
    """Folder for the logs, one folder a job; on a disk that all machines see."""

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ValueError(
                f"--slurm.time {self.time}: give minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds (in quotes in YAML)"
            )
        if self.job_name in _NO_LIGHTNING:
            raise ValueError(
                f"--slurm.job_name {self.job_name}: Lightning takes a job of that name for an "
                "interactive shell; choose another"
            )
        if "%" in str(self.logs):
            raise ValueError(f"--slurm.logs {self.logs}: name a folder without %")

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def parameters(self, command: str) -> dict[str, object]:
        """The options as submitit takes them; what it does not know goes to sbatch as it is."""
        known = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "ntasks_per_node": self.tasks,
            "cpus_per_task": self.cpus_per_task,
            "array_parallelism": self.array_parallelism,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "job_name": self.job_name or f"memfree-{command}",
            "setup": self._setup(),
        }
        rest = {
            # USR2, its default, is taken by submitit itself.
            "signal": f"USR1@{self.signal_seconds}",
            "requeue" if self.requeue else "no-requeue": True,
            "time": self.time,
            "mem": self.mem,
            **self.extra,
        }
        return {
            **{name: value for name, value in known.items() if value is not None},
            # Else submitit asks for five minutes, and for a key that some clusters refuse.
            "time": None,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": {
                name: value for name, value in rest.items() if value is not None
            },
        }

    def _setup(self) -> list[str]:
        # Since SLURM 22.05 srun does not take it from the job.
        warned = f"export {SIGNAL_SECONDS}={self.signal_seconds}"
        cores = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if self.cpus_per_task else []
        return [warned, *cores, *self.setup]
