"""Requeue a Slurm job on the warning of its end."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from memfree.slurm.launcher import is_first_process

WARNINGS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals of the end: USR1 if the job requested it (``--signal=USR1@120``), else SIGTERM."""
SIGNAL_SECONDS = "MEMFREE_SIGNAL_SECONDS"
"""Environment variable in which ``memfree submit`` stores --slurm.signal_seconds."""
DEFAULT_SIGNAL_SECONDS = 120
_EXACTNESS = 60.0  # seconds by which Slurm may warn earlier
_heeded: ContextVar[bool] = ContextVar("heeded", default=False)
_ATTEMPTS = 3  # of asking Slurm's controller; each waits for its answer for some seconds
_TURN = 5.0  # seconds that another task of a farm leaves to the first, which may have ended before
_PATIENCE = 60.0  # seconds that the other tasks of a job leave to the first, which requeues it


def job_id() -> str | None:
    """Slurm job of this task, as ``scontrol`` takes it; None if there is nothing to requeue."""
    if "SLURM_PROCID" not in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{element}" if array and element else os.environ["SLURM_JOB_ID"]


def requeue(goes_on: bool = True) -> str | None:
    """Requeue this job if it is still running; returns why not, or None.

    A warned or preempted job runs; a cancelled one, or one at its limit, does not and stays so. A
    job that does not resume (``goes_on`` false) is not requeued near its time limit: it would loop.
    """
    number = job_id()
    if number is None:
        return "this is not a Slurm job"
    answer = _ask("squeue", "--noheader", "--format=%T %L", "--jobs", number)
    state, _, left = ("" if answer is None else answer.stdout.strip()).partition(" ")
    if state != "RUNNING":
        return f"Slurm says that job {number} is {state or 'unknown'}"
    given = os.environ.get(SIGNAL_SECONDS, "")
    warned = float(given) if given.isdecimal() else DEFAULT_SIGNAL_SECONDS
    if not goes_on and _seconds(left) <= warned + _EXACTNESS:
        return "this command begins again when it is stopped, so it needs a longer time limit"
    answer = _ask("scontrol", "requeue", number)
    # Slurm ends this job, scontrol included, once it has accepted the request.
    if answer is None or answer.returncode > 0:
        reason = "" if answer is None else answer.stderr.strip()
        return f"scontrol requeue {number} failed {reason}".strip()
    return None


def _seconds(left: str) -> float:
    """Parse squeue's time left, ``[days-][[hours:]minutes:]seconds``; infinite without one."""
    days, _, clock = left.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")):
        return math.inf
    seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))
    return 86400 * int(days or 0) + seconds


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    for attempt in range(_ATTEMPTS):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode <= 0:
            return done
        if attempt + 1 < _ATTEMPTS:
            time.sleep(1)
    return done


@contextmanager
def requeued_when_warned(goes_on: bool = True) -> Iterator[None]:
    """Inside a Slurm job: on a warning, requeue the job and end this process at once.

    Nothing is lost: finished work is in place and the requeued job resumes from there. Training
    installs its own handler to save a checkpoint first (``memfree.training.checkpoints``). Does
    nothing in a command that another one runs, as a study does: the outer one resumes.
    """
    if job_id() is None or _heeded.get():
        yield
        return

    first = is_first_process()  # later each task of a farm is the first of its own run

    def leave(number: int, *_: object) -> None:
        ignore()
        requeues = is_first_process()
        if not requeues or not first:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # Slurm may end the job with its first task that ends.
            time.sleep(_TURN if requeues else _PATIENCE)
        if requeues:
            reason = requeue(goes_on)
            what = "the job is requeued" if reason is None else f"not requeued: {reason}"
            print(f"memfree: received {signal.Signals(number).name}: {what}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # No exception: it could be caught, or wait for others.
        os._exit(128 + number)

    token = _heeded.set(True)
    try:
        with handled(leave):
            yield
    finally:
        _heeded.reset(token)


def ignore() -> None:
    """Ignore further warnings: the end has begun."""
    if threading.current_thread() is threading.main_thread():
        for number in WARNINGS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def handled(
    handler: Callable[..., Any], numbers: Sequence[signal.Signals] = WARNINGS
) -> Iterator[None]:
    """Let ``handler`` receive these signals inside this context; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
