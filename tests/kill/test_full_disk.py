"""A disk that becomes full, or that may not be written: one line, and earlier results unharmed."""

import os
import shutil
import subprocess

import pytest
from kill_commands import make_inputs, words
from kill_compare import contents, difference
from kill_server import KillServer

COMMANDS = ("prepare", "train", "index_pixels", "index_network", "sample", "evaluate")
SHARES = {"prepare": [0.1, 0.6], "train": [0.1, 0.5, 0.9], "sample": [0.3, 0.8]}
"""How much of what the command needs there is room for."""
DISK = 32 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = KillServer(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def inputs(server, tmp_path_factory):
    return make_inputs(server, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "memfree-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refusal(ended, folder):
    """The one line of a command that ended with status 2."""
    assert ended.status == 2, ended.output
    lines = [line for line in ended.output.splitlines() if "memfree: error" in line]
    assert len(lines) == 1 and "Traceback" not in ended.output, ended.output
    assert "out" in lines[0]
    return lines[0]


def fill(disk, room):
    """Leave only ``room`` bytes."""
    free = shutil.disk_usage(disk).free
    with open(disk / "filler", "wb") as file:
        file.write(bytes(max(0, free - room)))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(server, inputs, tmp_path, disk, name):
    command = words(inputs)[name]
    ended = server.run(command, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    earlier = disk / "earlier"
    shutil.copytree(tmp_path / "whole" / "out", earlier)
    before = contents(earlier)
    for share in SHARES.get(name, [0.5]):
        fill(disk, int(size * share))
        line = refusal(server.run(command, disk / "work", plenty=True), disk)
        assert "full" in line, line
        assert "make room" in line or "nothing was written" in line
        (disk / "filler").unlink()
        again = server.run(command, disk / "work")
        assert again.status == ended.status, again.output
        assert difference(expected, contents(disk / "work")) is None
        shutil.rmtree(disk / "work")
    assert difference(before, contents(earlier)) is None


@pytest.mark.slow
def test_a_full_disk_leaves_the_result_that_would_be_replaced(server, inputs, tmp_path, disk):
    for name, more in (
        ("prepare", ["--seed=1", "--overwrite=true"]),
        ("index_pixels", ["--overwrite=true"]),
        ("train", ["--trainer.max_steps=9"]),
    ):
        command, folder = words(inputs)[name], disk / name
        assert server.run(command, folder).status == 0
        before = contents(folder)
        fill(disk, 9000)
        line = refusal(server.run([*command, *more], folder, plenty=True), folder)
        assert "full" in line
        (disk / "filler").unlink()
        after = contents(folder)
        if name == "train":  # which goes on with its checkpoints
            keep = [key for key in before if "diffusers" in key or key.endswith("manifest.json")]
            assert difference({k: before[k] for k in keep}, {k: after.get(k) for k in keep}) is None
            assert server.run([*command, *more], folder).status == 0
        else:
            assert difference(before, after) is None
        shutil.rmtree(folder)


@pytest.mark.slow
def test_read_only(server, inputs, disk):
    """Refused where something is to be made; what is finished can be asked for again."""
    assert server.run(words(inputs)["prepare"], disk / "made").status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in COMMANDS:
        command = [
            word.replace("--out=out", f"--out={disk}/new/out") for word in words(inputs)[name]
        ]
        line = refusal(server.run(command, inputs / "making"), disk)
        assert "cannot be written: it is read-only" in line, (name, line)
        assert str(disk / "new" / "out") in line
    again = server.run(words(inputs)["prepare"], disk / "made")
    assert again.status == 0 and "already prepared" in again.output
    more = [*words(inputs)["prepare"], "--seed=1", "--overwrite=true"]
    assert "read-only" in refusal(server.run(more, disk / "made"), disk)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "train", "index_pixels"])
def test_a_limit_on_the_size_of_files(server, inputs, tmp_path, name):
    """The same line for a quota, which needs no rights to test."""
    line = refusal(server.run(words(inputs)[name], tmp_path / "work", largest=6000), tmp_path)
    assert "full" in line
    assert not (tmp_path / "work" / "out" / "manifest.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(server, inputs, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    command = [
        word.replace("--out=out", f"--out={tmp_path}/shut/out") for word in words(inputs)["prepare"]
    ]
    assert "read-only or belongs to" in refusal(server.run(command, inputs / "making"), tmp_path)
