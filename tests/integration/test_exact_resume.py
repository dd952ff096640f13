"""Training stopped and resumed is training undisturbed: weights, average, optimizer, loss, all."""

import io
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from trained_state import difference, trained_state

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import DuplicationPlan, PartSizes
from memfree.models import DDPMModule
from memfree.training.checkpoints import latest_checkpoint, step_of

SMALL = [
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.layers_per_block=1",
    "--model.network.norm_num_groups=4",
    "--model.network.dropout=0.2",
    "--model.warmup_steps=2",
    "--trainer.log_every_n_steps=3",
    "--trainer.sample_grid_every_n_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.checkpoint_every_n_steps=2",
]
STEPS = 7
"""Two epochs of three batches and one step; steps of two batches are four to an epoch and a bit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 training digits, two of them 8 times: 44 records."""
    out = tmp_path_factory.mktemp("resume") / "digits"
    parts = PartSizes(train=30, calibration=20, test=10, fit=10)
    prepare(out, parts=parts, plan=DuplicationPlan(images=2, factor=8), records_per_shard=20)
    return out


def words(folder, out, *more):
    return [f"--data.path={folder}", f"--out={out}", f"--trainer.max_steps={STEPS}", *SMALL, *more]


class Killed(BaseException):
    """Ends a training as a kill does: nothing is written any more."""


def stop_after(monkeypatch, batches):
    """Let training end in the middle, in the step after so many batches."""
    count = iter(range(1000))
    step = DDPMModule.training_step

    def stopping(self, batch, batch_idx):
        if next(count) == batches:
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DDPMModule, "training_step", stopping)
    # Nothing saves at an exception.
    monkeypatch.setattr("memfree.training.loggers.LossLog.finalize", lambda self, status: None)


def check_same(whole, resumed):
    assert whole["checkpoint"]["global_step"] == STEPS
    assert difference(whole, resumed) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        (["--trainer.accumulate_grad_batches=2"], [4, 5, 9]),
        (["--data.random_flip=true", "--model.class_conditional=true"], [5]),
    ],
    ids=["plain", "accumulated", "flipped"],
)
def test_stopped_at_any_batch(folder, tmp_path, monkeypatch, options, batches):
    more = ["--data.batch_size=16", "--trainer.devices=1", *options]
    entry.run(train, words(folder, tmp_path / "whole", *more))
    whole = trained_state(tmp_path / "whole")
    for stop in batches:
        out = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, stop)
            entry.run(train, words(folder, out, *more))
        entry.run(train, words(folder, out, *more))
        check_same(whole, trained_state(out))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(0, 2), (2, 1)])
def test_with_another_number_of_workers(folder, tmp_path, monkeypatch, workers):
    more = ["--data.batch_size=16", "--trainer.devices=1"]
    entry.run(train, words(folder, tmp_path / "whole", *more))
    before, after = (f"--data.num_workers={number}" for number in workers)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 4)
        entry.run(train, words(folder, tmp_path / "out", *more, before))
    entry.run(train, words(folder, tmp_path / "out", *more, after))
    check_same(trained_state(tmp_path / "whole"), trained_state(tmp_path / "out"))


RANKS = """
import os, sys
from memfree.cli import entry as cli
from memfree.models import DDPMModule
from memfree.commands.train import train
step, last = DDPMModule.training_step, int(sys.argv[1])
def stopping(self, batch, batch_idx):
    if self.trainer.global_step == last:
        os._exit(9)
    return step(self, batch, batch_idx)
DDPMModule.training_step = stopping
cli.run(train, sys.argv[2:])
"""


def on_ranks(tmp_path, last, arguments):
    """Two processes, which end at once when they have taken ``last`` steps."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    return subprocess.run(
        [sys.executable, str(script), str(last), *arguments, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_two_ranks_and_then_another_number(folder, tmp_path, capsys):
    done = on_ranks(tmp_path, -1, words(folder, tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    assert on_ranks(tmp_path, 5, words(folder, tmp_path / "out")).returncode != 0
    assert step_of(latest_checkpoint(tmp_path / "out" / "checkpoints")) == 4
    shutil.copytree(tmp_path / "out", tmp_path / "one")
    one = ["--trainer.devices=1"]
    with pytest.raises(SystemExit):  # within an epoch, with half as many records a step
        entry.run(train, words(folder, tmp_path / "out", *one, "--data.batch_size=8"))
    assert "epoch of 3 batches of at most 16 records, now it would" in capsys.readouterr().err
    done = on_ranks(tmp_path, -1, words(folder, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    check_same(trained_state(tmp_path / "whole"), trained_state(tmp_path / "out"))
    # One process with batches of twice the size goes on with the same records.
    entry.run(train, words(folder, tmp_path / "one", *one, "--data.batch_size=16"))
    exposures = "exposures.parquet"
    assert (tmp_path / "one" / exposures).read_bytes() == (
        tmp_path / "whole" / exposures
    ).read_bytes()


@pytest.mark.slow
def test_two_ranks_with_workers_and_accumulated_batches(folder, tmp_path):
    more = ["--data.num_workers=1", "--trainer.accumulate_grad_batches=2"]
    done = on_ranks(tmp_path, -1, words(folder, tmp_path / "whole", *more))
    assert done.returncode == 0, done.stderr
    assert on_ranks(tmp_path, 5, words(folder, tmp_path / "out", *more)).returncode != 0
    assert step_of(latest_checkpoint(tmp_path / "out" / "checkpoints")) == 4
    done = on_ranks(tmp_path, -1, words(folder, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    check_same(trained_state(tmp_path / "whole"), trained_state(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 8], ids=["same", "half"])
def test_stopped_at_the_end_of_an_epoch(folder, tmp_path, monkeypatch, size):
    """Of three batches; the next one may have others, and has all its records."""
    every = "--trainer.checkpoint_every_n_steps=3"
    more = ["--trainer.devices=1", every]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 4)
        entry.run(train, words(folder, tmp_path / "out", *more, "--data.batch_size=16"))
    assert step_of(latest_checkpoint(tmp_path / "out" / "checkpoints")) == 3
    if size == 16:
        entry.run(train, words(folder, tmp_path / "out", *more, "--data.batch_size=16"))
        entry.run(train, words(folder, tmp_path / "whole", *more, "--data.batch_size=16"))
        check_same(trained_state(tmp_path / "whole"), trained_state(tmp_path / "out"))
    else:
        steps = "--trainer.max_steps=9"
        entry.run(train, words(folder, tmp_path / "out", *more, "--data.batch_size=8", steps))
        table = parquet.read_table(tmp_path / "out" / "exposures.parquet").to_pydict()
        assert table["exposures"] == [2 * copies for copies in table["copies"][:30]] + 40 * [0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_foreign_shards_with_broken_records(tmp_path, monkeypatch, workers):
    """Every fifth image does not decode; 40 others are an epoch of three batches."""
    shards = tmp_path / "shards"
    shards.mkdir()
    generator = np.random.default_rng(0)
    for number in range(5):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            for record in range(10):
                image = io.BytesIO()
                pixels = generator.integers(0, 255, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(image, "PNG")
                data = image.getvalue() if record % 5 else b"broken"
                member = tarfile.TarInfo(f"{record}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    stream = {"epoch_records": 40, "image_size": 8, "channels": 1, "shuffle_buffer": 8}
    more = [f"--data.stream.{name}={value}" for name, value in stream.items()]
    more += ["--data.on_error=skip", f"--data.num_workers={workers}", "--data.random_flip=true"]
    more += ["--data.batch_size=16", "--trainer.devices=1"]
    entry.run(train, words(shards, tmp_path / "whole", *more))
    for stop in (3, 5):
        out = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, stop)
            entry.run(train, words(shards, out, *more))
        entry.run(train, words(shards, out, *more))
        check_same(trained_state(tmp_path / "whole"), trained_state(out))
