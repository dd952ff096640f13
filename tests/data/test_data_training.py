"""The data module and the exposure counter in Lightning: resume, two ranks, refusals."""

import dataclasses
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pretended_device import counted_waits, moved

from memfree.data import DatasetFolder, ShardDataModule, StreamOptions
from memfree.data.options import DataOptions
from memfree.training import ExposureCounter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Recorder(lightning.LightningModule):
    """Trains one number and notes every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["key"]))
        return (self.weight - batch["image"].mean()).square() * batch["weight"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, steps=-1, epochs=-1, checkpoint=None, every=None, checkpoints=()):
    """Train; returns the recorder, whose ``seen`` is what this call trained on."""
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ExposureCounter(), *checkpoints],
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module


def by_step(folder, steps):
    return ModelCheckpoint(
        folder,
        "step{step}",
        every_n_train_steps=steps,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )


def exposures(folder):
    return pq.read_table(folder / "exposures.parquet")


@pytest.fixture(scope="module")
def whole(digits_folder, tmp_path_factory):
    """20 steps in epochs of 6 batches, with checkpoints at steps 4, 8, 12, 16 and epochs' ends."""
    folder = tmp_path_factory.mktemp("whole")
    ends = ModelCheckpoint(folder, "epoch{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    data = ShardDataModule(str(digits_folder), batch_size=16)
    module = fit(data, folder, steps=20, checkpoints=[by_step(folder, 4), ends])
    return folder, module


def test_epochs_are_whole(whole, digits_folder):
    _, module = whole
    train = DatasetFolder(digits_folder).part("train")
    for epoch in range(3):
        keys = Counter(key for e, _, batch in module.seen if e == epoch for key in batch)
        assert keys == dict(zip(train.keys, train.copies.tolist(), strict=True))
    assert [len(batch) for e, _, batch in module.seen if e == 1] == [14, 15, 15, 14, 15, 15]


@pytest.mark.parametrize(
    ("name", "workers"),
    [(f"step{step}", 0) for step in (4, 8, 12, 16)]
    + [("epoch0", 0), ("epoch1", 0), ("step8", 2), ("epoch0", 2)],
)
def test_resumed_run_sees_the_rest(whole, digits_folder, tmp_path, name, workers):
    folder, module = whole
    data = ShardDataModule(str(digits_folder), batch_size=16, num_workers=workers)
    resumed = fit(data, tmp_path, steps=20, checkpoint=folder / f"{name}.ckpt")
    done = {"epoch0": 6, "epoch1": 12}.get(name) or int(name[4:])
    assert resumed.seen == module.seen[done:]
    assert torch.equal(resumed.weight, module.weight)
    assert exposures(tmp_path).equals(exposures(folder))


def test_workers_end_with_the_training(digits_folder, tmp_path):
    before = set(multiprocessing.active_children())
    fit(ShardDataModule(str(digits_folder), batch_size=16, num_workers=2), tmp_path, steps=2)
    assert set(multiprocessing.active_children()) <= before


def test_exposures(whole, digits_folder):
    folder, module = whole
    table = exposures(folder)
    assert table.column_names == ["image_key", "group", "copies", "exposures"]
    counted = Counter(key for _, _, batch in module.seen for key in batch)
    found = dict(zip(table["image_key"].to_pylist(), table["exposures"].to_pylist(), strict=True))
    assert {key: count for key, count in found.items() if count} == counted
    train = set(DatasetFolder(digits_folder).part("train").keys)
    assert all(found[key] == 0 for key in found.keys() - train)


def test_exposures_of_foreign_shards(tmp_path, make_shard):
    make_shard(tmp_path, 0, 10)
    options = StreamOptions(epoch_records=10, image_size=8)
    data = ShardDataModule(str(tmp_path / "*.tar"), batch_size=4, stream=options)
    fit(data, tmp_path, epochs=1, checkpoints=[by_step(tmp_path, 2)])
    assert exposures(tmp_path)["exposures"].to_pylist() == [1] * 10
    fit(data, tmp_path, epochs=2, checkpoint=tmp_path / "step2.ckpt")
    assert exposures(tmp_path)["exposures"].to_pylist() == [2] * 10


def test_skipped_records_are_counted_through_a_restart(tmp_path, tar, encode, caplog):
    good = encode(np.zeros((9, 9, 3), np.uint8))
    members = [(f"{number:02d}.png", good) for number in range(2, 10)]
    tar(tmp_path / "a.tar", [("00.txt", b"no image"), ("01.png", b"broken"), *members])
    options = StreamOptions(epoch_records=8, image_size=8, shuffle_buffer=1)

    def run(folder, epochs, checkpoint=None):
        data = ShardDataModule(str(tmp_path), batch_size=4, stream=options, on_error="skip")
        fit(data, folder, epochs=epochs, checkpoint=checkpoint, checkpoints=[by_step(folder, 3)])
        counts = exposures(folder).schema.metadata[b"skipped"]
        return json.loads(counts)

    counts = run(tmp_path / "whole", 3)
    assert counts["kept"] == 24 and counts["records"] == 6 and counts["shards"] == []
    assert caplog.messages[-1] == "6 of 30 records skipped"
    assert sum("a/01: not a PNG" in message for message in caplog.messages) == 1
    assert run(tmp_path / "rest", 3, tmp_path / "whole" / "step3.ckpt") == counts


def test_another_dataset_seed_or_batch_is_refused(whole, digits_folder, tmp_path):
    from memfree.commands.prepare import prepare
    from memfree.data import PartSizes

    folder, _ = whole
    checkpoint = folder / "step8.ckpt"
    prepare(tmp_path / "other", parts=PartSizes(train=88), seed=9)
    with pytest.raises(ValueError, match=r"on other records than .*other gives now: data\.hash is"):
        data = ShardDataModule(str(tmp_path / "other"), batch_size=16)
        fit(data, tmp_path, steps=20, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"data\.seed is 0 there and 1 here"):
        data = ShardDataModule(str(digits_folder), batch_size=16, seed=1)
        fit(data, tmp_path, steps=20, checkpoint=checkpoint)
    data = ShardDataModule(str(digits_folder), batch_size=8)
    with pytest.raises(
        ValueError, match="6 batches of at most 16 records, now it would have 11 .* 8"
    ):
        fit(data, tmp_path, steps=20, checkpoint=checkpoint)


def test_other_foreign_shards_or_another_way_to_read_them_is_refused(tmp_path, make_shard):
    make_shard(tmp_path, 0, 10)
    options = StreamOptions(epoch_records=10, image_size=8)

    def run(path, stream, checkpoint=None):
        data = ShardDataModule(path, batch_size=4, stream=stream)
        fit(data, tmp_path, steps=4, checkpoint=checkpoint, checkpoints=[by_step(tmp_path, 2)])

    run(str(tmp_path / "*.tar"), options)
    checkpoint = tmp_path / "step2.ckpt"
    run(str(tmp_path / "*.tar"), options, checkpoint)
    with pytest.raises(ValueError, match=r"data\.path is"):
        run(str(tmp_path), options, checkpoint)
    with pytest.raises(ValueError, match=r"data\.stream\.resize is 'crop' there and 'pad' here"):
        run(str(tmp_path / "*.tar"), replace(options, resize="pad"), checkpoint)


@pytest.mark.parametrize("name", ["epoch0", "step12"])
@pytest.mark.parametrize(("size", "batches"), [(22, 4), (8, 11)])
def test_another_batch_size_after_a_whole_epoch(
    whole, digits_folder, tmp_path, name, size, batches
):
    """The next epoch has all its batches, whether the old one had more or fewer."""
    folder, _ = whole
    epoch, done = {"epoch0": (1, 6), "step12": (2, 12)}[name]
    data = ShardDataModule(str(digits_folder), batch_size=size)
    resumed = fit(data, tmp_path, steps=done + batches + 1, checkpoint=folder / f"{name}.ckpt")
    assert [(number, batch) for number, batch, _ in resumed.seen] == [
        *((epoch, i) for i in range(batches)),
        (epoch + 1, 0),
    ]
    assert sum(len(keys) for number, _, keys in resumed.seen if number == epoch) == 88


def test_fewer_batches_than_were_trained_on_are_refused(whole, digits_folder, tmp_path):
    """Lightning would take the epoch for a whole one."""
    folder, _ = whole
    data = ShardDataModule(str(digits_folder), batch_size=44)
    with pytest.raises(ValueError, match="epoch of 6 batches"):
        fit(data, tmp_path, steps=20, checkpoint=folder / "step4.ckpt")


def test_foreign_shards_go_on_with_the_same_readers_only(tmp_path, make_shard):
    for number in range(3):
        make_shard(tmp_path, number, 8)
    options = StreamOptions(epoch_records=24, image_size=8)

    def run(folder, steps, workers, checkpoint=None):
        data = ShardDataModule(str(tmp_path), 8, stream=options, num_workers=workers)
        checkpoints = [by_step(folder, 1)]
        return fit(data, folder, steps, checkpoint=checkpoint, checkpoints=checkpoints).seen

    whole = run(tmp_path / "whole", 6, 0)
    within, end = (tmp_path / "whole" / f"step{step}.ckpt" for step in (2, 3))
    with pytest.raises(ValueError, match="1 rank with 1 worker each read, now 1 rank with 3 work"):
        run(tmp_path / "other", 6, 3, within)
    assert run(tmp_path / "same", 6, 1, within) == whole[2:]
    rest = run(tmp_path / "end", 6, 3, end)
    assert [seen[:2] for seen in rest] == [(1, 0), (1, 1), (1, 2)]


def test_bad_options(digits_folder):
    with pytest.raises(ValueError, match="--data.batch_size 0"):
        ShardDataModule(str(digits_folder), batch_size=0)
    with pytest.raises(ValueError, match="--data.num_workers -1"):
        ShardDataModule(str(digits_folder), num_workers=-1)


def test_exposures_need_our_data(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=1,
        callbacks=[ExposureCounter()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match="batches of a ShardDataModule only"):
        trainer.fit(Recorder(), torch.utils.data.DataLoader([1], batch_size=1))


SCRIPT = """
import json, sys
from pathlib import Path
import lightning, torch
sys.path[:0] = {folders!r}
from test_data_training import Recorder, by_step
from memfree.training import ExposureCounter
from memfree.data import ShardDataModule

data_folder, out = sys.argv[1], Path(sys.argv[2])
for run, (steps, checkpoint) in enumerate([(4, None), (12, out / "step4.ckpt")]):
    data = ShardDataModule(data_folder, batch_size=8)
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[ExposureCounter(), by_step(out, 4)],
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    seen = {{"seen": module.seen, "weight": float(module.weight.detach())}}
    (out / f"run{{run}}-rank{{trainer.global_rank}}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_two_ranks(digits_folder, tmp_path, whole):
    """Stopped within an epoch and resumed: what one rank with the double batch trains on."""
    script = tmp_path / "script.py"
    folders = [str(Path(__file__).parents[level]) for level in range(2)]
    script.write_text(textwrap.dedent(SCRIPT.format(folders=folders)))
    subprocess.run(
        [sys.executable, script, digits_folder, tmp_path],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = []
    for rank in range(2):
        runs = [json.loads((tmp_path / f"run{n}-rank{rank}.json").read_text()) for n in (0, 1)]
        ranks.append((runs[0]["seen"] + runs[1]["seen"], runs[1]["weight"]))
    assert len(ranks[0][0]) == len(ranks[1][0]) == 12
    _, module = whole
    for expected, first, second in zip(module.seen, ranks[0][0], ranks[1][0], strict=False):
        assert first[:2] == second[:2] == list(expected[:2])
        assert first[2] + second[2] == expected[2]
    assert ranks[0][1] == ranks[1][1]
    table = exposures(tmp_path)
    train = DatasetFolder(digits_folder).part("train")
    found = dict(zip(table["image_key"].to_pylist(), table["exposures"].to_pylist(), strict=True))
    for key, copies in zip(train.keys, train.copies.tolist(), strict=True):
        assert found[key] == 2 * copies  # two epochs


def test_counting_exposures_waits_for_no_device(tmp_path, digits_folder, monkeypatch):
    """A copy of the rows to the host would wait for the whole training step."""
    data = ShardDataModule(digits_folder, batch_size=4)
    data.setup("fit")
    trainer = SimpleNamespace(
        datamodule=data, is_global_zero=True, global_step=1, max_steps=9, strategy=None
    )
    counter = ExposureCounter(str(tmp_path))
    with counted_waits(monkeypatch) as waits:
        counter.on_train_start(trainer, None)
        rows = [torch.tensor([3, 5, 3, 0]), torch.tensor([5, 1])]
        batches = [{"row": moved(row), "weight": 1.0, "key": []} for row in rows]
        batches.append({"row": moved(rows[0]), "weight": 0.0, "key": []})
        counter.on_train_batch_end(trainer, None, None, batches[0], 0)  # moves the counts there
        waits.counts.clear()
        for number, batch in enumerate(batches[1:], 1):
            counter.on_train_batch_end(trainer, None, None, batch, number)
        assert waits.counts.total() == 0, waits.counts
        counted = counter.state_dict()["rows"]
    assert counted.device.type == "cpu"
    assert counted[:6].tolist() == [1, 1, 0, 2, 0, 2] and counted.sum() == 6


def test_options_of_the_command_line_are_the_data_modules_own():
    options = {field.name: field for field in dataclasses.fields(DataOptions)}
    taken = dict(inspect.signature(ShardDataModule).parameters)
    assert options.keys() == taken.keys()
    given = vars(DataOptions("folder"))
    for name, parameter in taken.items():
        assert parameter.default in (given[name], inspect.Parameter.empty)
