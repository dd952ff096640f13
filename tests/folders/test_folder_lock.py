"""The lock of an output folder: who is refused, and what a killed process leaves behind."""

import contextlib
import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from memfree.cli import entry
from memfree.folders import lock as folder_lock
from memfree.folders.lock import FolderLock, read_holder


def forked(work):
    """Run a function in a fork of this process, which costs no imports; its process number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid):
    """Exit status of a fork, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL


def holder(path, with_child=False):
    """A process that holds the lock until it is killed."""
    ready, tell = os.pipe()

    def hold():
        lock = FolderLock(path, "--out o")
        lock.acquire()
        if with_child:
            forked(lambda: time.sleep(1))
        os.write(tell, b".")
        time.sleep(60)

    pid = forked(hold)
    assert os.read(ready, 1) == b"."
    return pid


def test_the_second_is_refused_by_host_and_process(tmp_path):
    holding = holder(tmp_path / ".lock")
    lock = FolderLock(tmp_path / ".lock", "--out runs/a")
    with pytest.raises(ValueError) as refused:
        lock.acquire()
    message = str(refused.value)
    assert "\n" not in message
    assert f"--out runs/a: process {holding} on {socket.gethostname()}, since 20" in message
    kill(holding)
    # Its file is still there, and is no lock.
    assert read_holder(tmp_path / ".lock")["pid"] == holding
    lock.acquire()
    assert read_holder(tmp_path / ".lock")["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".lock").exists()


def test_what_a_killed_process_has_started_is_waited_for(tmp_path):
    """A worker that outlives it may still be writing."""
    holding = holder(tmp_path / ".lock", with_child=True)
    kill(holding)
    start = time.monotonic()
    lock = FolderLock(tmp_path / ".lock", "--out o")
    lock.acquire()
    assert time.monotonic() - start > 0.2
    lock.release()


def without_locks(monkeypatch):
    """Let the file system have no locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("left", ["nothing", "a dead process's file"])
def test_never_two_at_once(tmp_path, monkeypatch, locks, left):
    if not locks:
        without_locks(monkeypatch)
    number = tmp_path / "number"
    number.write_text("0")
    dead = {"host": socket.gethostname(), "pid": 4194304999, "since": "then", "job": None}
    # A short while in which two could be inside is made longer.
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _, sleep=time.sleep: sleep(0.001))

    def count():
        for _ in range(60):
            lock = FolderLock(tmp_path / ".lock", "--out o")
            lock.acquire(wait=60)
            inside = number.read_text()
            time.sleep(0.001)
            number.write_text(str(int(inside) + 1))
            lock.release()
            if left != "nothing":
                leave(tmp_path, json.dumps(dead))

    counting = [forked(count) for _ in range(3)]
    assert [ended(pid) for pid in counting] == [0, 0, 0]
    assert number.read_text() == "180"
    assert left != "nothing" or not (tmp_path / ".lock").exists()


def leave(folder, text):
    """What a process leaves that was killed with the lock, if there is none now."""
    mine = folder / f"{os.getpid()}"
    mine.write_text(text)
    with contextlib.suppress(FileExistsError):
        os.link(mine, folder / ".lock")


class TestWithoutLocksOfTheFileSystem:
    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        without_locks(monkeypatch)

    def lock(self, folder, **changes):
        mine = {"host": socket.gethostname(), "pid": os.getppid(), "since": "then", "job": None}
        (folder / ".lock").write_text(json.dumps({**mine, **changes}))
        return FolderLock(folder / ".lock", "--out o")

    def test_a_process_that_runs_holds_it(self, tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getppid()} on"):
            self.lock(tmp_path).acquire()

    def test_one_that_has_ended_does_not(self, tmp_path):
        lock = self.lock(tmp_path, pid=4194304999)
        lock.acquire()
        lock.release()

    def test_a_file_that_does_not_say_whose_it_is_is_held(self, tmp_path):
        """Its maker has not come to write into it, or its machine has not sent that yet."""
        (tmp_path / ".lock").touch()
        with pytest.raises(ValueError, match=r"if it has ended, delete .*\.lock"):
            FolderLock(tmp_path / ".lock", "--out o").acquire()

    def test_nothing_is_left(self, tmp_path, monkeypatch):
        lock = self.lock(tmp_path, pid=4194304999)
        lock.acquire()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        lock.release()

        def full(_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(folder_lock.os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            lock.acquire()
        assert list(tmp_path.iterdir()) == []

    def test_of_another_machine_it_cannot_be_known(self, tmp_path):
        lock = self.lock(tmp_path, host="node7", pid=4194304999)
        with pytest.raises(
            ValueError, match=r"on node7, since then.*if it has ended, delete .*\.lo"
        ):
            lock.acquire()
        (tmp_path / ".lock").unlink()
        lock.acquire()
        lock.release()

    def test_an_earlier_start_of_the_same_job_has_ended(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        self.lock(tmp_path, host="node7", job=["12", "0"]).acquire()
        with pytest.raises(ValueError, match="node7"):
            self.lock(tmp_path, host="node7", job=["12", "1"]).acquire()
        with pytest.raises(ValueError, match="node7"):
            self.lock(tmp_path, host="node7", job=["11", "0"]).acquire()


def write(out: Path) -> None:
    """Write a folder.

    Args:
        out: where.
    """
    raise AssertionError("was called")


def test_any_command_with_out_is_refused_at_once(tmp_path, capsys):
    holding = holder(tmp_path / ".o.memfree.lock")
    with pytest.raises(SystemExit) as exit_:
        entry.run(write, [f"--out={tmp_path / 'o'}"])
    kill(holding)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"process {holding} on {socket.gethostname()}" in lines[0]
    for name, command in entry.COMMANDS.items():
        assert command.one_writer == (name not in ("study", "text-study")), name
