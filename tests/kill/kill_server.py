"""A process that has everything imported and forks a child for every command: cheap to kill."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_points import KillPoints, save

IMPORTED = (
    "memfree.cli.entry",
    "memfree.data",
    "memfree.commands.train",
    "memfree.commands.index",
    "memfree.retrieval.embed",
    "memfree.commands.sample",
    "memfree.evaluation",
    "memfree.commands.tune",
    "memfree.commands.train_embedding",
    "memfree.folders.lock",
    "memfree.folders.atomic",
    "sklearn.datasets",
    "sklearn.linear_model",
    "diffusers",
)


@dataclass
class Ended:
    """How a child ended."""

    status: int
    """Exit status, or minus the signal."""
    output: str
    """What it wrote to stdout and stderr."""
    events: list[tuple[str, str]]
    """The changes that it made; empty where it was killed."""
    seconds: float


class KillServer:
    """Starts the forking process; ``run`` is one command in a child of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(
        self,
        words: list[str],
        cwd: Path,
        at: int | None = None,
        how: str = "before",
        plenty: bool = False,
        largest: int | None = None,
    ) -> int:
        """Start a command in a child; returns its process number.

        Args:
            words: the command and its options.
            cwd: where it runs, made if need be.
            at: see ``KillPoints``.
            how: see ``KillPoints``.
            plenty: tell it that the disk has room, whatever is true.
            largest: bytes of a file beyond which writing fails.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        request = {
            "words": words,
            "cwd": str(cwd),
            "at": at,
            "how": how,
            "plenty": plenty,
            "largest": largest,
            "output": str(self.folder / "output"),
            "events": str(self.folder / "events"),
        }
        assert self._process.stdin is not None
        for name in ("output", "events"):
            (self.folder / name).write_text("")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> Ended:
        """Wait for the command that ``begin`` started."""
        answer = self._answer()
        events = (self.folder / "events").read_text()
        return Ended(
            answer["status"],
            (self.folder / "output").read_text(),
            [tuple(event) for event in json.loads(events)] if events else [],
            answer["seconds"],
        )

    def run(
        self,
        words: list[str],
        cwd: Path,
        at: int | None = None,
        how: str = "before",
        plenty: bool = False,
        largest: int | None = None,
    ) -> Ended:
        """A command from beginning to end, as ``begin`` has it."""
        self.begin(words, cwd, at, how, plenty, largest)
        return self.wait()

    def close(self) -> None:
        """End the forking process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Fork a child for every line of stdin."""
    for name in IMPORTED:
        importlib.import_module(name)
    tasks = Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    threads = [name for name in names if name != "jemalloc_bg_thd"]  # pyarrow's; survives a fork
    assert len(threads) == 1, f"{threads}: a fork would lose all but one"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            answers.close()
            os._exit(child(request))
        print(json.dumps({"pid": pid}), file=answers)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        print(json.dumps({"status": code, "seconds": seconds}), file=answers)


def child(request: dict[str, Any]) -> int:
    """Run the command of a request; returns its exit status."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    points = KillPoints(Path(request["cwd"]), request["at"], request["how"])
    points.install()
    if request["plenty"]:
        shutil.disk_usage = lambda path: type("Usage", (), {"free": 1 << 50})
    if request["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], resource.RLIM_INFINITY))
    from memfree.cli.entry import run_command

    command, *arguments = request["words"]
    sys.argv = ["memfree", *request["words"]]
    status = 0
    try:
        run_command(command, arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    save(points.events, Path(request["events"]))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
