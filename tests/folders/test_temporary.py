"""Temporary names: nobody's file or folder is taken for another's, or for abandoned."""

import os
import shutil
import signal
import socket

import pytest

from memfree.folders import atomic
from memfree.folders.atomic import (
    clear_up,
    put_in_place,
    remove_temporary,
    unfinished,
    write_atomic,
    write_text,
)
from memfree.folders.lock import FolderLock, Part, one_writer, read_holder
from memfree.sampling.sample_run import SampleRun


def tree(folder):
    """Everything below a folder: its contents, or where it leads."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for path in folder.rglob("*")
    }


def killed(work):
    """Run a function in a fork that is killed at its end, with all that it holds."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "neighbour", ["x.v2", "x.node7-1", "x.0123456789abcdef01234567", "x.partial"]
)
def test_another_folder_whose_name_begins_alike_is_left_alone(tmp_path, neighbour):
    with unfinished(tmp_path / neighbour) as working:
        (working / "half").write_text("1")
        before = tree(tmp_path)
        with one_writer(tmp_path / "x"), unfinished(tmp_path / "x"):
            pass
        assert tree(tmp_path) == before
        put_in_place(working, tmp_path / neighbour, overwrite=False)
    assert list(tree(tmp_path)) == [neighbour, f"{neighbour}/half"]


@pytest.mark.parametrize(
    "left", [".x.v2.node7-4194304999.{}", f".x.v2.{socket.gethostname()}-4194304999.{{}}"]
)
def test_nor_is_one_of_an_earlier_version(tmp_path, left):
    for suffix in ("partial", "old"):
        (tmp_path / left.format(suffix)).mkdir()
    before = tree(tmp_path)
    with one_writer(tmp_path / "x"):
        pass
    assert tree(tmp_path) == before
    with one_writer(tmp_path / "x.v2"):
        pass
    assert list(tree(tmp_path)) == ["x.v2"]


def test_somebodys_own_hidden_folder_is_kept(tmp_path):
    own = tmp_path / ".x.backup-2024.old" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with one_writer(tmp_path / "x"), unfinished(tmp_path / "x"):
        pass
    assert own.read_text() == "mine"


def test_a_file_is_written_twice_under_one_process_number(tmp_path):
    """Processes of two containers may all have number 1."""
    path = tmp_path / "file"

    def outer(place):
        place.write_text("outer")
        write_text(path, "inner")
        assert path.read_text() == "inner" and place.read_text() == "outer"

    write_atomic(path, outer)
    assert tree(tmp_path) == {"file": b"outer"}


def test_a_folder_is_filled_twice_under_one_process_number(tmp_path):
    out = tmp_path / "out"
    with unfinished(out) as first:
        (first / "a").write_text("1")
        with unfinished(out) as second:
            clear_up(out, sole_writer=True)
            assert first != second and (first / "a").is_file() and second.is_dir()
            put_in_place(second, out, overwrite=False)
    assert list(tree(tmp_path)) == ["out"]


def test_what_a_killed_process_left_is_cleared_up(tmp_path):
    def work():
        with unfinished(tmp_path / "out") as working:
            (working / "half").write_text("1")
            write_atomic(tmp_path / "file", lambda _: os.kill(os.getpid(), signal.SIGKILL))

    killed(work)
    assert len(tree(tmp_path)) == 3
    with unfinished(tmp_path / "out"):
        assert len([name for name in tree(tmp_path) if "out" in name]) == 1
    remove_temporary(tmp_path)
    assert tree(tmp_path) == {}


def test_one_of_another_machine_is_cleared_up_under_the_lock(tmp_path, monkeypatch):
    """Locks of some network file systems hold on one machine only."""
    monkeypatch.setattr(atomic.socket, "gethostname", lambda: "node7")

    def work():
        with unfinished(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    with unfinished(tmp_path / "out"):
        assert left.exists()
    with one_writer(tmp_path / "out"), unfinished(tmp_path / "out"):
        assert not left.exists()


def test_a_file_that_is_being_written_is_not_abandoned(tmp_path):
    write_atomic(tmp_path / "file", lambda place: (remove_temporary(tmp_path), place.stat()))


def test_temporaries_are_made_and_not_followed(tmp_path, monkeypatch):
    """Even if somebody guessed the name."""
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / "own").write_text("own")
    (tmp_path / f".file.{atomic._machine()}0000000000000000.tmp").symlink_to(tmp_path / "own")
    (tmp_path / f".out.{atomic._machine()}0000000000000000.partial").symlink_to(tmp_path)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "new")
    with pytest.raises(FileExistsError), unfinished(tmp_path / "out"):
        pass
    assert (tmp_path / "own").read_text() == "own" and not (tmp_path / "file").exists()
    clear_up(tmp_path / "out", sole_writer=True)
    assert (tmp_path / "own").is_file()


def test_folders_below_are_of_other_commands(tmp_path):
    """A command that is refused touches nothing, one that succeeds only its own folder."""
    for name in ("x/.a.77.tmp", "x/y/.b.0123456789abcdef01234567.tmp", "x/y/z/.c.5.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before = tree(tmp_path)
    with pytest.raises(ValueError), one_writer(tmp_path / "x"):
        raise ValueError("refused")
    assert tree(tmp_path) == before
    with one_writer(tmp_path / "x"):
        pass
    assert before.keys() - tree(tmp_path).keys() == {"x/.a.77.tmp"}


IN_THE_WAY = {
    "link to a file": lambda path, own: path.symlink_to(own),
    "link to nothing": lambda path, own: path.symlink_to(own.with_name("missing")),
    "link to a folder": lambda path, own: path.symlink_to(own.parent),
    "own file": lambda path, own: path.write_text("my notes"),
    "own JSON": lambda path, own: path.write_text('{"packages": []}'),
    "bytes": lambda path, own: path.write_bytes(b"\xff\xfe\0"),
    "folder": lambda path, own: path.mkdir(),
    "fifo": lambda path, own: os.mkfifo(path),  # would be waited for
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("place", [".x.memfree.lock", ".x.memfree-1-of-2.lock"])
def test_what_is_not_a_lock_file_is_not_touched(tmp_path, what, place):
    (tmp_path / "own").write_text("own")
    IN_THE_WAY[what](tmp_path / place, tmp_path / "own")

    def everything():
        return {path.name: path.lstat() for path in tmp_path.iterdir()}

    before = everything()
    part = Part(1, 2) if "1-of-2" in place else Part()
    with pytest.raises(ValueError, match=place), one_writer(tmp_path / "x", part):
        pass
    assert {name: found.st_size for name, found in everything().items()} == {
        name: found.st_size for name, found in before.items()
    }
    assert (tmp_path / "own").read_text() == "own"


@pytest.mark.parametrize("name", [".x.lock", ".lock", ".x.part-1-of-2.lock"])
def test_files_of_other_programs_are_kept(tmp_path, name):
    place = tmp_path / "x" / name if name == ".lock" else tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.touch()
    (tmp_path / "y").symlink_to(place)
    with one_writer(tmp_path / "x"):
        assert place.is_file()
    assert place.is_file() and not place.read_bytes()


def test_a_fifo_of_the_older_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".x.lock")
    with one_writer(tmp_path / "x"):
        pass


def test_the_lock_of_an_earlier_version_is_heeded(tmp_path):
    older = FolderLock(tmp_path / ".x.lock", "--out x")
    older.acquire()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"), one_writer(tmp_path / "x"):
        pass
    older.release()
    (tmp_path / ".x.lock").write_text('{"host": "node7", "pid": 7, "since": "then"}')
    with one_writer(tmp_path / "x"):
        pass
    assert tree(tmp_path) == {}


def test_a_part_and_a_folder_of_its_name_have_two_locks(tmp_path):
    for name in ("x.part-1-of-2", "x.memfree-1-of-2"):
        with one_writer(tmp_path / "x", Part(1, 2)), one_writer(tmp_path / name):
            assert read_holder(tmp_path / f".{name}.memfree.lock")["pid"] == os.getpid()
    assert tree(tmp_path) == {}


def test_number_1_of_another_container_has_not_ended(tmp_path, monkeypatch):
    """Without locks of the file system; with them it does not matter."""

    def refuse(*_):
        raise OSError(95, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    lock = FolderLock(tmp_path / "lock", "--out x")
    lock.acquire()
    holder = read_holder(tmp_path / "lock")
    text = (tmp_path / "lock").read_text()
    other = text.replace(str(holder["pid"]), "4194304999")
    (tmp_path / "lock").write_text(other.replace(holder["processes"], "pid:[1]"))
    with pytest.raises(ValueError, match="4194304999"):
        FolderLock(tmp_path / "lock", "--out x").acquire()
    (tmp_path / "lock").write_text(other)
    FolderLock(tmp_path / "lock", "--out x").acquire()


def test_somebodys_own_traces_are_not_taken_for_left_over(tmp_path):
    """Traces without samples, which a killed run leaves, are removed."""
    (tmp_path / "trace-of-thought.parquet").touch()
    with pytest.raises(ValueError, match="trace-of-thought"):
        SampleRun(tmp_path, {}, 1).check()
    SampleRun(tmp_path, {}, 1).clean_up()
    assert (tmp_path / "trace-of-thought.parquet").exists()


def test_a_finished_sample_folder_keeps_a_users_own_files(tmp_path):
    run = SampleRun(tmp_path / "s", {}, 0)
    with run:
        for name in (".lock-notes", ".lock-7", ".a.b.tmp"):
            (run.folder / name).write_text("mine")
        run.clean_up()
        run.finish(0)
    assert {".lock-notes", ".lock-7", ".a.b.tmp"} <= {path.name for path in run.folder.iterdir()}
    shutil.rmtree(run.folder)
