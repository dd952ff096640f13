"""``memfree submit COMMAND``: run a command as a Slurm job."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from memfree.cli.entry import COMMANDS, as_options, command_of, load, parsed, parser_of
from memfree.cli.errors import options_of, unknown_command
from memfree.cli.stages import Stage
from memfree.folders.atomic import write_text
from memfree.folders.lock import ALL
from memfree.slurm.launcher import is_launchers, launched
from memfree.slurm.requeue import DEFAULT_SIGNAL_SECONDS, SIGNAL_SECONDS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_NO_LIGHTNING = ("bash", "interactive")


@dataclass(frozen=True)
class SlurmOptions:
    """What a job requests from SLURM; names are those of ``sbatch``."""

    partition: str | None = None
    """Partition, or several separated by commas; the cluster's default otherwise."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each machine; each has its own task, a process."""
    tasks_per_node: PositiveInt | None = None
    """Processes on each machine; by default one a GPU, or one."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of each process, its data workers included."""
    mem: str | None = None
    """Memory of each machine, as 64G."""
    time: str | None = None
    """Time limit: minutes, hours:minutes:seconds or days-hours:minutes:seconds (in quotes in YAML);
    default: the partition's. At the limit a job is requeued and resumes, but prepare, evaluate,
    audit, tune and train-... start over and need a limit that suffices."""
    signal_seconds: PositiveInt = DEFAULT_SIGNAL_SECONDS
    """Seconds before the time limit, or preemption where the cluster allows, at which the job is
    warned, saves and is requeued; exact to half a minute."""
    array: PositiveInt = 1
    """Jobs that share sample, index of a network, or study, each by its --part; the last to end
    finishes the folder."""
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
        """The options as submitit takes them; unknown ones go to sbatch unchanged."""
        same = (
            *("partition", "account", "qos", "nodes", "gpus_per_node", "cpus_per_task"),
            *("array_parallelism", "constraint", "exclude"),
        )
        # Since SLURM 22.05 srun does not take it from the job.
        cores = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if self.cpus_per_task else []
        rest = {
            # submitit itself uses USR2, its default.
            "signal": f"USR1@{self.signal_seconds}",
            "requeue" if self.requeue else "no-requeue": True,
            "time": self.time,
            "mem": self.mem,
            **self.extra,
        }
        return {
            **_given({name: getattr(self, name) for name in same}),
            "ntasks_per_node": self.tasks,
            "job_name": self.job_name or f"memfree-{command}",
            "setup": [f"export {SIGNAL_SECONDS}={self.signal_seconds}", *cores, *self.setup],
            # Else submitit requests five minutes, and a key that some clusters refuse.
            "time": None,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": _given(rest),
        }


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


_SAYS_WHERE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK")
"""Variables that tell SLURM's commands where SLURM is, inside a job and elsewhere."""
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
)
"""Variables by which SLURM gives a job its GPUs."""


@dataclass(frozen=True)
class Submission:
    """A command with its whole configuration, as YAML, and what its job requests.

    The job reads the configuration from beside the logs: later edits of the files on the command
    line do not change a job that waits or restarts.
    """

    command: str
    configuration: str
    slurm: SlurmOptions

    @property
    def path(self) -> Path:
        """Where the configuration is written; equal ones share a name."""
        digest = hashlib.sha256(self.configuration.encode()).hexdigest()[:8]
        return self.slurm.logs.absolute() / f"{self.command}-{digest}.yaml"

    @property
    def stage(self) -> Stage:
        """The command as each task of the job runs it."""
        return Stage(self.command, {"config": self.path})

    @property
    def parts(self) -> list[str]:
        """The --part of each job of an array; empty for a single job."""
        of = int(self.slurm.array)
        return [f"{number}/{of}" for number in range(1, of + 1)] if of > 1 else []

    def script(self) -> str:
        """The batch script."""
        executor = self._executor(_Unsubmitted)
        if self.parts:
            executor.parameters["map_count"] = len(self.parts)  # like submitit's own submission
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self) -> str:
        """Submit the job or array; returns its number."""
        if SlurmExecutor.affinity() < 0:
            raise ValueError(
                "there is no SLURM here (no command srun): submit on a machine of the cluster"
            )
        write_text(self.path, self.configuration)
        executor = self._executor(SlurmExecutor)
        # submitit pickles only the name of this function and the strings.
        words = self.command, str(self.path), os.getcwd()
        try:
            with outside_of_job():
                if self.parts:
                    columns = zip(*((*words, part) for part in self.parts), strict=True)
                    job = executor.map_array(run_in_job, *columns)[0]
                else:
                    job = executor.submit(run_in_job, *words)
        except FailedJobError as error:
            # The last line of sbatch.
            lines = [line for line in str(error).splitlines() if line.strip()] or ["sbatch failed"]
            reason = re.sub(r"^sbatch: (error|fatal): ", "", lines[-1])
            raise ValueError(f"SLURM refused the job: {reason}") from error
        return str(job.job_id).split("_")[0]

    def _executor(self, kind: type[SlurmExecutor]) -> SlurmExecutor:
        executor = kind(self.slurm.logs.absolute() / "%j")
        executor.update_parameters(**self.slurm.parameters(self.command))
        return executor

    def log(self, number: str) -> Path:
        """The log of the first task of the job, or of an array's first job."""
        job = f"{number}_0" if self.parts else number
        return self.slurm.logs / job / f"{job}_0_log.out"


@contextmanager
def outside_of_job() -> Iterator[None]:
    """Inside a job, hide its SLURM variables from sbatch, which would pass them to the new job.

    These are CPU binding, memory per CPU and devices. What users tell sbatch is kept: where SLURM
    is, and the options of SBATCH_*.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    users = {
        name: value
        for name, value in os.environ.items()
        if name in _SAYS_WHERE or (name.startswith("SBATCH_") and "_BIND" not in name)
    }
    of_this_job = [name for name in os.environ if is_launchers(name)]
    with clean_env([*of_this_job, *_DEVICES]):
        os.environ.update(users)
        yield


class _Unsubmitted(SlurmExecutor):
    """Writes scripts only, even without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def run_in_job(command: str, configuration: str, folder: str, part: str | None = None) -> None:
    """Run a command, or a part of it, in a job, from the folder where it was submitted."""
    os.chdir(folder)
    options = {"config": configuration} | ({} if part is None else {"part": part})
    status = Stage(command, options).run()
    if isinstance(status, int) and status != 0:
        raise SystemExit(status)  # submitit lets it through, and SLURM keeps it


_ONE_PROCESS = {"demo", "study", "text-study"}
OVERVIEW = """usage: memfree submit COMMAND [options of the command] [--slurm.OPTION VALUE ...]

Submit a command of memfree as a SLURM job. Its options are checked at once; the job runs it in
this folder with this interpreter, one process a GPU.

  --slurm.nodes, --slurm.gpus_per_node, --slurm.time, ...  what the job asks for
  --slurm.array 8                                          eight jobs share sample, index or study
  --config configs/slurm/multi_node.yaml                   the same from a file
  --dry_run true                                           print the batch script only

memfree submit COMMAND --help explains all options."""


def main(arguments: Sequence[str]) -> None:
    """Submit the command after ``memfree submit``, and print how to follow the job."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    launch = launched()
    if launch.several:
        raise ValueError(f"memfree submit: {launch.started}; submit once, from a single process")
    command, *rest = arguments
    if command not in COMMANDS:
        raise ValueError(f"memfree submit: {unknown_command(command, list(COMMANDS))}")
    submission, dry_run = submission_of(command, rest)
    slurm = submission.slurm
    if dry_run:
        print(submission.script())
        print(f"# every task runs: {submission.stage.line()}")
        if submission.parts:
            print(f"# with --part {submission.parts[0]} to {submission.parts[-1]}, one a job")
        print("# with this configuration:")
        print("\n".join(f"#   {line}" for line in submission.configuration.splitlines()))
        return
    number = submission.submit()
    tasks = f"{slurm.nodes} x {slurm.tasks} tasks" if slurm.nodes * slurm.tasks > 1 else "one task"
    jobs = f"an array of {slurm.array} jobs, each of " if submission.parts else ""
    print(f"submitted job {number}: {command}, {jobs}{tasks}")
    print(f"  its state:  squeue --jobs {number}")
    print(f"  its log:    tail --retry -F {submission.log(number)}")
    print(f"  to end it:  scancel {number}")
    if submission.parts:
        part = f"--part 1/{slurm.array}"
        print(f"  one again:  the same command with {part} instead of --slurm.array")


def submission_of(command: str, arguments: Sequence[str]) -> tuple[Submission, bool]:
    """What a command line requests, and whether only to show it."""
    given = as_options(arguments, COMMANDS[command].positional)
    if any(word.partition("=")[0] == "--allow_code" for word in given):
        raise ValueError("--allow_code is for the command line: a job has its options in a file")
    function = load(command_of(command, given))
    parser = parser_of(function, f"memfree submit {command}")
    parser.add_argument("--slurm", type=SlurmOptions, default=SlurmOptions())
    own_dry_run = "--dry_run" in options_of(parser)  # a study's; here it means the job's
    if not own_dry_run:
        text = "Whether the batch script is only printed."
        parser.add_argument("--dry_run", type=bool, default=False, help=text)
    config = parsed(parser, given)
    # The functions' own classes check more than types.
    slurm: SlurmOptions = parser.instantiate(config).slurm
    dry_run = config.pop("dry_run")
    if own_dry_run:
        config["dry_run"] = False
    config.pop("slurm")
    _check_array(parser, command, config, slurm)
    _set_devices(parser, config, given, command, slurm)
    own = parser_of(function, command)
    # Includes null values, which need not be the default.
    return Submission(command, own.dump(config, skip_unset=False), slurm), dry_run


def _check_array(
    parser: ArgumentParser, command: str, config: Namespace, slurm: SlurmOptions
) -> None:
    if slurm.array == 1:
        return
    option = f"--slurm.array {slurm.array}"
    if "--part" not in options_of(parser):
        raise ValueError(f"{option}: {command} has no parts; arrays are for sample, index, study")
    if config.part != ALL:
        raise ValueError(f"{option} gives each job its part: leave --part {config.part} out")
    if command == "index" and config.features == "pixels":
        raise ValueError(f"{option}: an index of pixels has no parts; give --features of a network")


def _set_devices(
    parser: ArgumentParser,
    config: Namespace,
    arguments: list[str],
    command: str,
    slurm: SlurmOptions,
) -> None:
    """Give the command the job's processes; conflicting values of the user are refused."""
    by_tasks = "--slurm.tasks_per_node" if slurm.tasks_per_node else "--slurm.gpus_per_node"
    # Plain numbers: the configuration is written as YAML.
    wanted = (
        ("devices", by_tasks, "--slurm.tasks_per_node", int(slurm.tasks)),
        ("num_nodes", "--slurm.nodes", "--slurm.nodes", int(slurm.nodes)),
    )
    if "trainer.devices" not in config or command in _ONE_PROCESS:
        for _, source, remedy, number in wanted:
            if number > 1:
                raise ValueError(f"{source} {number}: {command} is one process; give {remedy} 1")
        return
    given = parsed(parser, arguments, defaults=False)
    for name, source, _, number in wanted:
        option = f"trainer.{name}"
        if option in given and str(given[option]) not in (str(number), "auto"):
            raise ValueError(
                f"--{option} {given[option]} contradicts {source} {number}: leave --{option} out"
            )
        config[option] = number
