"""A command as a job: submitit writes the batch script and submits it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from memfree.folders.atomic_files import write_text
from memfree.launcher import is_launchers
from memfree.slurm.options import SlurmOptions
from memfree.stages import Stage

_SAYS_WHERE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK")
"""Variables by which SLURM's commands find SLURM, inside a job and elsewhere."""
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
)
"""Variables by which SLURM gives a job its GPUs."""


@dataclass(frozen=True)
class Submission:
    """One command with its whole configuration, and what its job asks for.

    The configuration is written beside the logs, and the job reads it from there: what the files of
    the command line become later does not change a job that waits or starts again.
    """

    command: str
    """``train``, ``sample``, or a verb of ``memfree``."""
    configuration: str
    """All its options, as YAML."""
    slurm: SlurmOptions

    @property
    def path(self) -> Path:
        """Where the configuration is written; the same one has the same name."""
        digest = hashlib.sha256(self.configuration.encode()).hexdigest()[:8]
        return self.slurm.logs.absolute() / f"{self.command}-{digest}.yaml"

    @property
    def stage(self) -> Stage:
        """The command as each task of the job runs it."""
        return Stage(self.command, {"config": self.path})

    @property
    def parts(self) -> list[str]:
        """What each job of an array is told by --part; a job by itself is told nothing."""
        of = int(self.slurm.array)
        return [f"{number}/{of}" for number in range(1, of + 1)] if of > 1 else []

    def script(self) -> str:
        """The batch script."""
        executor = _executor(_Unsubmitted, self.command, self.slurm)
        if self.parts:
            executor.parameters["map_count"] = len(self.parts)  # as submitit's own submission does
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit(self) -> str:
        """Submit the job, or the array of jobs; its number.

        Raises:
            ValueError: there is no SLURM here, or it refuses the job.
            OSError: the folder of the logs cannot be written.
        """
        if SlurmExecutor.affinity() < 0:
            raise ValueError(
                "there is no SLURM here (no command srun): submit on a machine of the cluster"
            )
        write_text(self.path, self.configuration)
        executor = _executor(SlurmExecutor, self.command, self.slurm)
        # submitit pickles the name of this function and the strings, nothing of ours else.
        words = self.command, str(self.path), os.getcwd()
        try:
            with outside_of_job():
                if self.parts:
                    every = zip(*((*words, part) for part in self.parts), strict=True)
                    job = executor.map_array(run_in_job, *every)[0]
                else:
                    job = executor.submit(run_in_job, *words)
        except FailedJobError as error:
            raise ValueError(f"SLURM refused the job: {_reason(error)}") from error
        return str(job.job_id).split("_")[0]

    def log(self, number: str) -> Path:
        """What the first task of the job writes, of an array its first job's."""
        job = f"{number}_0" if self.parts else number
        return self.slurm.logs / job / f"{job}_0_log.out"


@contextmanager
def outside_of_job() -> Iterator[None]:
    """Inside a job, hide what SLURM has said to that one from sbatch, which would pass it on.

    The new job would have its CPU binding, its memory a CPU or its devices beside its own. What a
    user says to sbatch is kept: where SLURM is, and the options of SBATCH_*.
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
    """Writes scripts only, also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def run_in_job(command: str, configuration: str, folder: str, part: str | None = None) -> None:
    """Run a command, or a part of it, in a job, in the folder where it was submitted.

    Raises:
        SystemExit: with the exit status of a command that has another than 0.
    """
    os.chdir(folder)
    options = {"config": configuration} | ({} if part is None else {"part": part})
    status = Stage(command, options).run()
    if isinstance(status, int) and status != 0:
        raise SystemExit(status)  # submitit lets it through, and SLURM keeps it


def _executor(kind: type[SlurmExecutor], command: str, slurm: SlurmOptions) -> SlurmExecutor:
    executor = kind(slurm.logs.absolute() / "%j")
    executor.update_parameters(**slurm.parameters(command))
    return executor


def _reason(error: Exception) -> str:
    """The last thing that sbatch said."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^sbatch: (error|fatal): ", "", lines[-1]) if lines else "sbatch failed"
