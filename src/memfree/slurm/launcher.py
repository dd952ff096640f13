"""Launchers (torchrun, Slurm, Kubernetes, MPI): rank and size of this process, checked."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

LIGHTNING = "Lightning"
"""Launcher of a process that Lightning or the user started."""
_NUMBER = re.compile(r"[0-9]{1,12}")
_TASKS_PER_NODE = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")
_PORTS = 15000, 10000
"""First meeting port under Slurm, and how many, as Lightning chooses them."""


@dataclass(frozen=True)
class Launch:
    """How many processes a launcher started, and which of them this is."""

    launcher: str = LIGHTNING  # srun, torchrun, mpirun, ... as a user would call it
    rank: int = 0  # among all processes
    size: int | None = 1  # all processes; None where the launcher does not say
    local_rank: int | None = None  # among those of its machine; None where it is not said
    per_node: tuple[int, ...] = ()
    """Processes on each machine, or one number if all have as many; empty: unknown."""

    @property
    def told(self) -> bool:
        """Whether the environment mentions a launcher."""
        return self != Launch()

    @property
    def several(self) -> bool:
        """Whether other processes are known."""
        return self.size is None or self.size > 1

    @property
    def started(self) -> str:
        """What the launcher did, for a message."""
        if self.size is None:
            return f"{self.launcher} started several processes"
        machines = ""
        if len(self.per_node) > 1:
            machines = f" ({', '.join(map(str, self.per_node))} on each node)"
        elif self.per_node and self.size > self.per_node[0]:
            machines = f" ({self.per_node[0]} on each node)"
        return f"{self.launcher} started {self.size} process{'es' * (self.size > 1)}{machines}"


class _Names(NamedTuple):
    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""


def _mpi(name: str) -> _Names:
    parts = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return _Names("mpirun", *(f"{name}_COMM_WORLD_{part}" for part in parts))


_TORCHRUN = _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = _Names("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_PMI = _Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_JSM = (f"JSM_NAMESPACE_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK"))
# mpirun under Slurm starts its daemons by srun: Slurm's variables are the daemon's.
_LAUNCHERS = (
    _mpi("OMPI"),
    _mpi("MV2"),
    _PMI,
    _SRUN,
    _Names("jsrun", *_JSM),
    _Names("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _Names("the launcher that set RANK", *_TORCHRUN[1:]),
)
_STEP_SIZE = "SLURM_STEP_NUM_TASKS"  # tasks of a step, whatever the job has
_RANKS = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID", "OMPI_COMM_WORLD_NODE_RANK")
_SIZES = (_STEP_SIZE, "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_STEP_NUM_NODES")
_SINGLE = {
    **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
    **dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", *_SIZES), "1"),
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
"""Slurm variables of a one-task step; the job itself stays, so that it can be requeued."""
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_")
_OF_TORCHRUN = ("GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")


def launched() -> Launch:
    """Processes that were started together, from the (checked) environment."""
    check_variables()
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:
        return _read(_TORCHRUN)
    for names in _LAUNCHERS:
        if names.rank not in os.environ or (names is _SRUN and not _in_srun()):
            continue
        if names is _PMI and _by_srun(names):
            continue
        launch = _read(names)
        if launch.several:
            return launch
    return _by_lightning() or (Launch("srun") if _in_srun() else Launch())


def _read(names: _Names) -> Launch:
    def number(value: str | None) -> int | None:
        return None if value is None else int(value)

    size, local_size = os.environ.get(names.size), os.environ.get(names.local_size)
    per_node: tuple[int, ...] = () if local_size is None else (int(local_size),)
    if names is _SRUN:
        size, per_node = _step_size(), _tasks_per_node()
    local_rank = number(os.environ.get(names.local_rank))
    return Launch(names.launcher, int(os.environ[names.rank]), number(size), local_rank, per_node)


def _by_lightning() -> Launch | None:
    """A process started by Lightning on one machine, or by the user on each of several."""
    if not {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys():
        return None
    local, node = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "NODE_RANK"))
    size = os.environ.get("WORLD_SIZE")
    # Only Lightning knows the rank of a process on another machine; it is not the first.
    return Launch(LIGHTNING, local or node, None if size is None else int(size), local)


def _in_srun() -> bool:
    """Whether srun started this process, not a batch script or a shell in an allocation."""
    if "SLURM_PROCID" not in os.environ:
        return False
    return "SLURM_STEP_ID" in os.environ or "SLURM_TASK_PID" not in os.environ


def _step_size() -> str | None:
    """Tasks of this step; in salloc's shell, SLURM_NTASKS is the allocation's."""
    return os.environ.get(_STEP_SIZE, os.environ.get(_SRUN.size))


def _by_srun(names: _Names) -> bool:
    """Whether srun set mpirun's variables, as it does for MPI programs."""
    ours = os.environ.get(names.rank), os.environ.get(names.size)
    return _in_srun() and ours == (os.environ.get(_SRUN.rank), _step_size())


def _tasks_per_node() -> tuple[int, ...]:
    """Parse tasks per node: ``2(x2),1`` is (2, 2, 1); one number if all are equal."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if text := os.environ.get(name):
            matches = [_TASKS_PER_NODE.fullmatch(part) for part in text.split(",")]
            counts = [(int(match[1]), int(match[2] or 1)) for match in matches if match is not None]
            if len(counts) < len(matches):
                raise ValueError(f"environment variable {name}={text!r}: not as Slurm writes it")
            if len(different := {tasks for tasks, _ in counts}) == 1:
                return (*different,)
            return tuple(tasks for tasks, nodes in counts for _ in range(nodes))
    given = os.environ.get("SLURM_NTASKS_PER_NODE")
    if given is not None:
        return (int(given),)
    tasks, nodes = (int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
    return (tasks // nodes,) if tasks % nodes == 0 else ()


def check_variables() -> None:
    """Refuse malformed launcher variables, by name."""
    for names in (_TORCHRUN, *_LAUNCHERS):
        _check_below(names.rank, names.size)
        is_local = os.environ.get(names.local_size) is not None
        _check_below(names.local_rank, names.local_size if is_local else names.size)
    if _in_srun():
        _check_below(_SRUN.rank, _STEP_SIZE)
    for name in (*_RANKS, "SLURM_JOB_ID"):
        _checked(name)
    for name in _SIZES:
        _checked(name, least=1)


def check_meeting() -> None:
    """Refuse a bad meeting place, such as ``MASTER_PORT=tcp://...`` of a Kubernetes "master"."""
    port = _checked("MASTER_PORT", least=1)
    if port is not None and port > 65535:
        raise ValueError(f"environment variable MASTER_PORT={port}: ports end at 65535")
    if os.environ.get("MASTER_ADDR", "set").strip() == "":
        raise ValueError("environment variable MASTER_ADDR is empty: unset it, or name a host")


def _checked(name: str, least: int = 0) -> int | None:
    value = os.environ.get(name) if name else None
    if value is None:
        return None
    if not _NUMBER.fullmatch(value) or int(value) < least:
        shown = "is empty" if not value.strip() else f"is {value[:40]!r}"
        raise ValueError(
            f"environment variable {name} {shown}, not a number of {least} or more as a launcher "
            "sets it: unset it for a single process"
        )
    return int(value)


def _check_below(rank: str, size: str) -> None:
    number, limit = _checked(rank), _checked(size, least=1)
    if number is not None and limit is not None and number >= limit:
        raise ValueError(
            f"environment variable {rank} is {number} and {size} {limit}: it must be smaller"
        )


def joined(launch: Launch, devices: int, nodes: int = 1) -> bool:
    """Whether the processes started together are one run; ValueError if they do not fit it.

    False for a run of this process alone, or one whose other processes Lightning starts.
    ``devices``: processes on each machine; ``nodes``: machines.
    """
    wanted = devices * nodes
    if wanted == 1:
        return False
    check_meeting()
    options = f"--trainer.devices {devices} --trainer.num_nodes {nodes}"
    if launch.launcher == LIGHTNING:
        if (launch.local_rank or 0) >= devices or int(os.environ.get("NODE_RANK", 0)) >= nodes:
            raise ValueError(
                f"{options}: LOCAL_RANK or NODE_RANK in the environment is too large for it"
            )
        if launch.size not in (None, 1, wanted):
            raise ValueError(f"{options}: WORLD_SIZE in the environment is {launch.size}")
        return bool({"LOCAL_RANK", "NODE_RANK"} & os.environ.keys()) or nodes > 1
    if launch.size is None:
        names = (_TORCHRUN, *_LAUNCHERS)
        name = next(each.size for each in names if each.launcher == launch.launcher)
        raise ValueError(
            f"{options}: {launch.started}, but {name} does not say how many: set it, or start them "
            "by torchrun"
        )
    if launch.size == 1 and nodes == 1:
        return False
    if launch.size != wanted or launch.per_node not in ((), (devices,)):
        raise ValueError(f"{options}: {launch.started}; {_ways(launch)}")
    local = launch.local_rank
    if local is not None and (local >= devices or (nodes == 1 and local != launch.rank)):
        raise ValueError(
            f"{options}: {launch.launcher} calls this process number {launch.rank} of all and "
            f"number {local} of its machine (both from 0), where {devices} devices on a machine "
            "have another: give as many as it has started on each machine"
        )
    return True


def _ways(launch: Launch) -> str:
    assert launch.size is not None
    devices = launch.per_node[0] if launch.per_node else launch.size
    if len(launch.per_node) > 1 or launch.size % devices:
        return (
            "start as many on each node (--ntasks-per-node) to work together, or give "
            "--trainer.devices 1 --trainer.num_nodes 1 for a separate run in each process"
        )
    if launch.size == 1:
        return "start one process per device"
    nodes = f" --trainer.num_nodes {launch.size // devices}" if launch.size > devices else ""
    return (
        f"give --trainer.devices {devices}{nodes} to work together, or --trainer.devices 1 for a "
        "separate run in each process"
    )


def advice(launch: Launch, shared_by: str) -> str:
    """What to do when processes of one launch meet at the same folder.

    ``shared_by``: option that shares the work (``--trainer.devices``, ``--part``), or empty.
    """
    if shared_by == "--trainer.devices" and launch.size is not None:
        return f"{launch.started}; {_ways(launch)}, with its own --out"
    if shared_by == "--part":
        return f"{launch.started}; give each its --part, as 1/{launch.size or 2}, or its own --out"
    return f"{launch.started}, and this command is one; start one, or give each its own --out"


@contextmanager
def as_one_run(launch: Launch, devices: int, nodes: int = 1) -> Iterator[None]:
    """Let the environment describe this run alone: where to meet if ``joined``, or one process."""
    before = {name: value for name, value in os.environ.items() if is_launchers(name)}
    try:
        if joined(launch, devices, nodes):
            os.environ.update(_meeting(launch, devices))
        elif before.keys() - {*_MEETING}:
            for name in before:
                del os.environ[name]
            # Slurm sets the number of tasks wherever it sets a task's own.
            said = before.keys() | ({_SRUN.size} if _SRUN.rank in before else set())
            os.environ.update({name: _SINGLE[name] for name in said if name in _SINGLE})
        yield
    finally:
        # Lightning sets some of them for the processes that it starts.
        for name in [name for name in os.environ if is_launchers(name)]:
            del os.environ[name]
        os.environ.update(before)


def is_launchers(name: str) -> bool:
    """Whether a launcher uses this environment variable to tell a process its place."""
    known = {name for names in (_TORCHRUN, *_LAUNCHERS) for name in names[1:] if name}
    known.update(_SINGLE, _MEETING, _RANKS, _OF_TORCHRUN)
    return name in known or name.startswith(_PREFIXES)


def _meeting(launch: Launch, devices: int) -> Mapping[str, str]:
    """Variables by which the processes of one run find each other."""
    # Lightning gets the meeting place from jsrun, and from MPI if mpi4py is there.
    if launch.launcher in (LIGHTNING, "jsrun") or knows_mpi(launch):
        return {}
    place = {name: os.environ[name] for name in _MEETING if name in os.environ}
    if launch.launcher == "srun":
        # Lightning refuses a number of tasks without this one.
        node, local = divmod(launch.rank, devices)
        said = {name: os.environ[name] for name in _SINGLE if name in os.environ}
        place = {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local), **said, **place}
        counts = {"SLURM_NTASKS": str(launch.size), "SLURM_NTASKS_PER_NODE": str(devices)}
        return {**_slurm_meeting(), **place, **counts}
    assert launch.size is not None
    if launch.size == devices:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12910", **place}
    if len(place) < 2:
        raise ValueError(
            f"{launch.started}, but not where they meet: set MASTER_ADDR and MASTER_PORT, or start "
            "them by torchrun"
        )
    local = launch.rank % devices if launch.local_rank is None else launch.local_rank
    numbers = {"RANK": launch.rank, "WORLD_SIZE": launch.size, "LOCAL_RANK": local}
    return {**{name: str(number) for name, number in numbers.items()}, **place}


def knows_mpi(launch: Launch) -> bool:
    """Whether the processes are MPI's and mpi4py can be imported."""
    return launch.launcher == "mpirun" and importlib.util.find_spec("mpi4py") is not None


def _slurm_meeting() -> dict[str, str]:
    """First node of this step, not of the job; a port for each step."""
    first, count = _PORTS
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number = int(job or 0) + 1009 * (int(step) if step.isdecimal() else 0)
    meeting = {"MASTER_PORT": str(first + number % count)} if job else {}
    if nodes := os.environ.get("SLURM_STEP_NODELIST"):
        meeting["MASTER_ADDR"] = _first_host(nodes)
    return meeting


def _first_host(nodes: str) -> str:
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def is_first_process() -> bool:
    """Whether this is the only process or the first one of its launch."""
    return launched().rank == 0
