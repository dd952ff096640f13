"""Running the commands of a study, with an estimate of the time left."""

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
from memfree.study.plan import Plan


class CellRun:
    """One cell of a plan, and what is known of its commands.

    Its record lists each command with the seconds that it has taken. The cell is finished when the
    list has all commands of the plan and the metrics exist: a subject that was added since, or an
    option that was changed, makes the cell run again, and each command that is done says so.
    """

    def __init__(self, plan: Plan, cell: Any) -> None:
        self.stages = plan.stages(cell)
        self._plan, self._cell, self._record = plan, cell, plan.record(cell)

    @property
    def finished(self) -> bool:
        """Whether all its commands, as they are planned now, were run to the end."""
        lines = dict.fromkeys(stage.line() for stage in self.stages)  # oracles may share some
        return [*self.known()] == [*lines] and self._plan.evaluated(self._cell)

    def known(self) -> dict[str, float]:
        """Seconds of each command that was run to its end, by its line.

        Raises:
            ValueError: the record is damaged.
        """
        if not self._record.is_file():
            return {}
        try:
            rows = read_json(self._record)
            return {str(row["command"]): float(row["seconds"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._record} is damaged ({short(error)}): delete it") from error

    def run(self, console: Console, taken: dict[str, float] | None = None) -> None:
        """Run what is missing; another process that runs the same command is waited for.

        ``taken``: seconds of commands that this process has run, by line; new ones are added.
        """
        before, now, taken = self.known(), dict[str, float](), {} if taken is None else taken
        for number, stage in enumerate(self.stages, 1):
            line = stage.line()
            if line not in taken:
                console.rule(f"{number} of {len(self.stages)}: {stage.command}", align="left")
                with _turn(self._plan.out / ".turns", stage, console):
                    start = time.perf_counter()
                    run_stages([stage], console)
                taken[line] = time.perf_counter() - start
            now[line] = before.get(line, 0.0) + taken[line]
            rows = {**before, **now} if number < len(self.stages) else now
            write_json(
                self._record,
                [{"command": key, "seconds": round(value, 2)} for key, value in rows.items()],
            )


@contextmanager
def _turn(folder: Path, stage: Stage, console: Console) -> Iterator[None]:
    """Keep two processes from running one command at once; whoever comes second finds it done.

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
    that are finished. A command that several cells share counts once.
    """
    stages = {stage.line(): stage for run in runs for stage in run.stages}
    seconds = {line: value for run in runs for line, value in run.known().items() if line in stages}
    done = {
        line
        for line, stage in stages.items()
        if (Path(stage.options["out"]) / "manifest.json").is_file()
    }
    parts = [f"{len(runs)} cells", f"{len(stages)} commands, {len(done)} of them finished"]
    for command, noun, what in (
        ("train", "trainings", "steps"),
        ("sample", "samplings", "samples"),
    ):
        lines = [line for line, stage in stages.items() if stage.command == command]
        units = sum(_units(stages[line]) for line in lines)
        finished = sum(line in done for line in lines)
        parts.append(f"{len(lines)} {noun} ({units} {what}), {finished} finished")
    left = _estimate([stages[line] for line in stages if line not in done], stages, seconds)
    if left is None:
        parts.append("no command is finished that the rest could be estimated from")
    else:
        length = f"{left / 3600:.1f} hours" if left >= 5400 else f"{left / 60:.0f} minutes"
        parts.append(f"the rest may take about {length}, one command after another")
    return "\n".join(parts)


def _estimate(
    left: Sequence[Stage], known: dict[str, Stage], seconds: dict[str, float]
) -> float | None:
    """Seconds that commands may take, from those of others by line; None if a kind is unknown."""
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
