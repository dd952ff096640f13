"""Whether a finished folder can be put in its place is known before the work."""

import subprocess

import pytest

from memfree.folders import atomic
from memfree.folders.atomic import check_place, refuse_mount_point


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(tmp_path, request):
    """A folder where a file system, or another folder of the same one, is mounted."""
    place = tmp_path / "a mount\tpoint"
    place.mkdir()
    (tmp_path / "other").mkdir()
    how = ["-t", "tmpfs", "memfree-test"] if request.param == "tmpfs" else ["--bind", "other"]
    done = subprocess.run(["mount", *how, place], cwd=tmp_path, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_mount_point_is_refused(mounted, tmp_path):
    (tmp_path / "link").symlink_to(mounted)
    for out in (mounted, tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="--out .* mount point"):
            check_place(out)
    check_place(mounted / "inside")
    assert list(mounted.iterdir()) == []


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_place(tmp_path / "new" / "folders" / "out")
    (tmp_path / "old").mkdir()
    check_place(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_one_that_cannot_be_written_is_found_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_place(tmp_path / "file" / "out")


def test_without_a_table_of_mounts(tmp_path, monkeypatch):
    """As on other systems than Linux."""

    class Missing:
        def __init__(self, *_):
            pass

        def read_bytes(self):
            raise FileNotFoundError

    monkeypatch.setattr(atomic, "Path", Missing)
    refuse_mount_point(tmp_path)
