"""One writer for a folder, or one for each part of it."""

import multiprocessing
import os
import time

import pytest

from memfree.folders.lock import Part, one_at_a_time, one_writer, part_of, read_holder


def test_only_the_first_process_locks(tmp_path, monkeypatch):
    with one_writer(tmp_path / "a"):
        with pytest.raises(ValueError, match="another process"), one_writer(tmp_path / "a"):
            pass
        monkeypatch.setenv("RANK", "1")
        with one_writer(tmp_path / "a"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_lock_by_whatever_name(tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "place").symlink_to(tmp_path / "disk")
    for one, two in (("disk/out", "link"), ("link", "place/out"), ("place/out", "disk/out")):
        with (
            one_writer(tmp_path / one),
            pytest.raises(ValueError, match="another process"),
            one_writer(tmp_path / two),
        ):
            pass
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ValueError, match="leads back to itself"), one_writer(tmp_path / "circle"):
        pass


def test_a_refused_command_leaves_no_folders(tmp_path):
    with pytest.raises(RuntimeError), one_writer(tmp_path / "new" / "folder" / "out"):
        assert (tmp_path / "new" / "folder" / ".out.memfree.lock").is_file()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def leave(tmp_path):
    """What killed runs left: half a folder, an earlier result that was moved aside, a file."""
    (tmp_path / ".out.node7-12.partial").mkdir()
    (tmp_path / ".out.0123456789abcdef01234567.partial").mkdir()
    aside = tmp_path / ".out.node7-13.old"
    aside.mkdir()
    (aside / "manifest.json").write_text("{}")
    (aside / ".config.yaml.77.tmp").touch()
    (aside / ".config.yaml.0123456789abcdef01234567.tmp").touch()


def test_the_only_writer_clears_up(tmp_path):
    """Also what was left on another machine; and the earlier result goes back to its place."""
    leave(tmp_path)
    with one_writer(tmp_path / "out"):
        assert (tmp_path / "out" / "manifest.json").is_file()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


def test_a_refused_command_only_puts_back(tmp_path):
    leave(tmp_path)
    with pytest.raises(ValueError, match="refused"), one_writer(tmp_path / "out"):
        raise ValueError("refused")
    left = [".out.0123456789abcdef01234567.partial", ".out.node7-12.partial", "out"]
    assert names(tmp_path) == left
    assert len(names(tmp_path / "out")) == 3


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parts_of_one_division_are_written_side_by_side(tmp_path):
    out = tmp_path / "out"
    with one_writer(out, Part(1, 3)), one_writer(out, Part(3, 3)):
        assert names(tmp_path) == [".out.memfree-1-of-3.lock", ".out.memfree-3-of-3.lock"]
        assert read_holder(tmp_path / ".out.memfree-1-of-3.lock")["pid"] == os.getpid()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "second"), [("1/3", "1/3"), ("1/3", "2/4"), ("1/3", "all"), ("all", "1/3")]
)
def test_nothing_else_is_written_beside_a_part(tmp_path, monkeypatch, first, second):
    monkeypatch.setattr("memfree.folders.lock._BEGINNING", 0.1)
    out = tmp_path / "out"
    with one_writer(out, part_of(first)):
        with (
            pytest.raises(ValueError, match=f"another process is writing to .*{os.getpid()}"),
            one_writer(out, part_of(second)),
        ):
            pass
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []
    with one_writer(out, part_of(second)):
        pass


def test_the_lock_file_of_a_killed_part_stops_nobody(tmp_path):
    (tmp_path / ".out.memfree-1-of-2.lock").write_text('{"host": "elsewhere", "pid": 1}')
    with one_writer(tmp_path / "out"):
        assert names(tmp_path) == [".out.memfree.lock"]


def test_only_a_part_without_others_clears_up(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = out / ".samples.7.tmp"
    left.touch()
    with one_writer(out, Part(1, 2)):
        with one_writer(out, Part(2, 2)):
            pass
        assert left.exists(), "the first may be writing it"
    assert not left.exists()
    assert names(tmp_path) == ["out"]


def _count(out, number, rounds):
    for _ in range(rounds):
        with one_at_a_time(out, Part(number, 4)):
            file = out / "number"
            value = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(value + 1))


def test_parts_finish_one_at_a_time(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    counting = [context.Process(target=_count, args=(out, number, 20)) for number in range(1, 5)]
    for process in counting:
        process.start()
    for process in counting:
        process.join()
    assert (out / "number").read_text() == "80"
