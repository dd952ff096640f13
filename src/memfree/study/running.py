"""Running a study's commands, with an estimate of the time left."""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from memfree.cli.stages import Stage, run_stages
from memfree.folders.atomic import write_json
from memfree.folders.lock import FolderLock
from memfree.folders.untrusted import read_json, short
from memfree.study.grid import Cell
from memfree.study.plan import Plan


class CellRun:
    """One cell of a study, and what is known of its commands.

    ``CELL/study-NAME.json`` lists each command with the seconds that it has taken. The cell is
    finished where the list has all commands of the plan and its figures are there: a subject that
    was added since, or an option that was changed, makes the cell run again, and each command that
    is done says so.

    Args:
        plan: the study.
        cell: one of its cells.
    """

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.stages = plan.stages(cell)
        self._path = plan.cell(cell) / f"study-{plan.name}.json"
        self._figures = plan.evaluation(cell) / "manifest.json"
        self._turns = plan.out / ".turns"

    @property
    def finished(self) -> bool:
        """Whether all its commands, as they are planned now, were run to the end."""
        known = self.known()
        return self._figures.is_file() and [*known] == [stage.line() for stage in self.stages]

    def known(self) -> dict[str, float]:
        """Seconds of each command that was run to its end, by its line.

        Raises:
            ValueError: the record is damaged.
        """
        if not self._path.is_file():
            return {}
        try:
            rows = read_json(self._path)
            return {str(row["command"]): float(row["seconds"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._path} is damaged ({short(error)}): delete it") from error

    def run(self, console: Console) -> None:
        """Run what is missing; another process that runs the same command is waited for."""
        before, now = self.known(), dict[str, float]()
        for number, stage in enumerate(self.stages, 1):
            line = stage.line()
            console.rule(f"{number} of {len(self.stages)}: {stage.command}", align="left")
            with _turn(self._turns, stage, console):
                start = time.perf_counter()
                run_stages([stage], console)
            now[line] = before.get(line, 0.0) + time.perf_counter() - start
            self._write({**before, **now} if number < len(self.stages) else now)

    def _write(self, seconds: dict[str, float]) -> None:
        rows: list[dict[str, Any]] = [
            {"command": line, "seconds": round(value, 2)} for line, value in seconds.items()
        ]
        write_json(self._path, rows)


@contextmanager
def _turn(folder: Path, stage: Stage, console: Console) -> Iterator[None]:
    """Keep two processes from running one command at once; who comes second finds it done.

    Unlike the command's own lock, which refuses a second writer, this one waits. It lies in the
    study's folder, and is the same however ``--out`` is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = Path(stage.options["out"]).resolve()
    name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    lock = FolderLock(folder / name, f"--out {stage.options['out']}")
    try:
        lock.acquire()
    except ValueError:
        line = f"waiting for another process that makes {stage.options['out']}"
        console.print(line, style="dim", markup=False, emoji=False, soft_wrap=True)
        lock.acquire(wait=math.inf)
    try:
        yield
    finally:
        lock.release()


UNITS = {"train": "trainer.max_steps", "sample": "count"}
"""Option that a command's time grows with; the others take as long each time."""


def plan_size(runs: Sequence[CellRun]) -> str:
    """Lines for the terminal: trainings, samples, what is finished, and an estimate of the rest.

    The estimate takes the seconds a training step, a sample, or a run of another command from those
    that are finished.

    Args:
        runs: cells; a command that several have counts once.
    """
    stages = {stage.line(): stage for run in runs for stage in run.stages}
    seconds = {line: value for run in runs for line, value in run.known().items() if line in stages}
    done = {line for line, stage in stages.items() if _is_done(stage)}
    parts = [f"{len(runs)} cells", f"{len(stages)} commands, {len(done)} of them finished"]
    for command, noun in (("train", "trainings"), ("sample", "samplings")):
        of = [line for line, stage in stages.items() if stage.command == command]
        units = sum(_units(stages[line]) for line in of)
        what = "steps" if command == "train" else "samples"
        finished = sum(line in done for line in of)
        parts.append(f"{len(of)} {noun} ({units} {what}), {finished} finished")
    left = estimate([stages[line] for line in stages if line not in done], stages, seconds)
    parts.append(
        "no command is finished that the rest could be estimated from"
        if left is None
        else f"the rest may take about {_duration(left)}, one command after another"
    )
    return "\n".join(parts)


def estimate(
    left: Sequence[Stage], known: dict[str, Stage], seconds: dict[str, float]
) -> float | None:
    """Seconds that commands may take.

    Args:
        left: the commands to estimate.
        known: commands by line.
        seconds: what some of those took.

    Returns:
        None if none of a command's kind is known.
    """
    total: dict[str, float] = defaultdict(float)
    units: dict[str, int] = defaultdict(int)
    for line, taken in seconds.items():
        total[known[line].command] += taken
        units[known[line].command] += _units(known[line])
    if any(stage.command not in total for stage in left):
        return None
    return sum(total[stage.command] / units[stage.command] * _units(stage) for stage in left)


def _units(stage: Stage) -> int:
    return int(stage.options[UNITS[stage.command]]) if stage.command in UNITS else 1


def _is_done(stage: Stage) -> bool:
    return (Path(stage.options["out"]) / "manifest.json").is_file()


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
