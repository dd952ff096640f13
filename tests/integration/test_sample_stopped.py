"""sample.py by several processes, in parts, killed and interrupted: the same samples."""

import signal
import time

import pytest
import torch
from tiny_sampling import begin, make_folders, options

from memfree.cli.entry import run
from memfree.commands.sample import predict
from memfree.images import to_bytes
from memfree.sampling import SampleFolder
from memfree.sampling.sample_run import shard_indices


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def unguided(folders):
    """One uninterrupted process."""
    out = folders / "unguided"
    run(predict, options(folders, out))
    return SampleFolder(out)


def test_parts_fill_one_folder(folders, unguided, tmp_path, capsys):
    out = tmp_path / "out"
    run(predict, options(folders, out, part="2/2"))
    assert f"{out}: part 2/2 is drawn; 4 samples of others are not" in capsys.readouterr().out
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="not a finished samples folder"):
        SampleFolder(out)
    run(predict, options(folders, out, part="1/2"))
    whole = SampleFolder(out)
    assert torch.equal(whole.images(), unguided.images())
    assert whole.trace().drop_columns(["nearest"]).num_rows == 7 * 4
    assert [path.name for path in sorted(out.glob("samples-*"))] == [
        "samples-001-000-000000.tar",
        "samples-001-000-000001.tar",
        "samples-002-000-000000.tar",
    ]
    assert "part: all" in (out / "config.yaml").read_text()
    run(predict, options(folders, out, part="1/2"))  # as a job that was requeued at its very end
    assert "is finished: 7 samples" in capsys.readouterr().out


def test_parts_at_the_same_time_and_a_part_again(folders, unguided, tmp_path):
    """Three processes, of which one fails; the same part again finishes the folder."""
    out = tmp_path / "out"
    failing = [*options(folders, out, part="3/3"), "--trainer.accelerator=abacus"]
    parts = [options(folders, out, part="1/3"), options(folders, out, part="2/3"), failing]
    processes = [begin(part) for part in parts]
    ended = [(process.communicate()[0], process.returncode) for process in processes]
    assert [status for _, status in ended] == [0, 0, 2], ended
    assert not (out / "manifest.json").exists()
    run(predict, options(folders, out, part="3/3"))
    assert torch.equal(SampleFolder(out).images(), unguided.images())
    assert not list(tmp_path.glob(".out*")), "no lock is left"


@pytest.mark.slow
def test_two_ranks_draw_the_same(folders, unguided):
    out = folders / "ranks"
    changes = {"batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}
    process = begin(options(folders, out, **changes))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    samples = SampleFolder(out)
    drawn_by = {path.name[8:11] for path in out.glob("samples-*.tar")}
    assert drawn_by == {"000", "001"}
    images = samples.images()
    difference = to_bytes(images).int() - to_bytes(unguided.images()).int()
    assert difference.abs().max() <= 1
    assert torch.equal(samples.conditions, unguided.conditions)
    assert samples.trace().num_rows == 7 * 4

    # One sample is missing, so one rank has nothing to do.
    (out / "manifest.json").unlink()
    (lost,) = [path for path in out.glob("samples-001-*.tar") if len(shard_indices(path)) == 1]
    lost.unlink()
    process = begin(options(folders, out, **changes))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert torch.equal(SampleFolder(out).images(), images)


@pytest.mark.slow
def test_a_killed_run_continues(folders):
    out = folders / "killed"
    changes = {
        "count": 30,
        "batch_size": 2,
        "steps": 20,
        "scheduler": "ddpm",
        "mitigation": "both",
    }
    arguments = options(folders, out, **changes)
    process = begin(arguments)
    deadline = time.monotonic() + 60
    while len(list(out.glob("samples-*.tar"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    whole = {path: path.read_bytes() for path in out.glob("samples-*.tar")}
    assert 0 < len(whole) < 15
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="not a finished"):
        SampleFolder(out)
    (out / ".samples-000-000099.tar.1.tmp").write_bytes(b"half")

    with pytest.raises(SystemExit):  # another configuration is refused
        run(predict, [*arguments, "--seed=1"])
    run(predict, arguments)
    assert all(path.read_bytes() == data for path, data in whole.items())
    done = sum(len(shard_indices(path)) for path in whole)
    later = [path for path in out.glob("samples-*.tar") if path not in whole]
    assert sum(len(shard_indices(path)) for path in later) == 30 - done
    assert not list(out.glob(".*.tmp"))

    run(predict, options(folders, folders / "not_killed", **changes))
    expected, samples = SampleFolder(folders / "not_killed"), SampleFolder(out)
    difference = to_bytes(samples.images()).int() - to_bytes(expected.images()).int()
    assert difference.abs().max() <= 1
    assert samples.records["nearest"] == expected.records["nearest"]


def test_interrupt_is_one_line(folders, tmp_path):
    out = tmp_path / "out"
    process = begin(options(folders, out, count=4000, batch_size=2))
    while not list(out.glob("samples-*.tar")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1] == "memfree: interrupted"
    assert text.count("interrupt") == 1 and "Traceback" not in text
    assert not (out / "manifest.json").exists()


def test_a_shard_that_was_cut_is_named_and_can_be_drawn_again(folders, tmp_path, capsys):
    arguments = options(folders, tmp_path / "out")
    run(predict, arguments)
    before = SampleFolder(tmp_path / "out").images()
    shard = tmp_path / "out" / "samples-000-000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    for _ in range(2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(predict, arguments)
        assert exit_.value.code == 2
        assert f"{shard} has 700 bytes, not" in capsys.readouterr().err
    shard.unlink()
    run(predict, arguments)
    assert "7 samples" in capsys.readouterr().out
    assert torch.equal(SampleFolder(tmp_path / "out").images(), before)
    run(predict, arguments)
    assert "is finished" in capsys.readouterr().out
