"""Validation on the held-out test part, in Trainers of users and in ``memfree train``."""

import csv
import shutil

import numpy as np
import pytest
import torch
from tiny_text import CAPTIONS, tiny_pipeline
from torch.utils.data import DataLoader
from trained_state import difference, trained_state

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import DatasetFolder, PartSizes, ShardDataModule, StreamOptions
from memfree.data.batches import PartLoader
from memfree.diffusion_math import training_target
from memfree.models import DDPMModule, FineTuneOptions, ModelOptions, NetworkOptions
from memfree.models.module import VALIDATED_AT
from memfree.models.text_to_image import TextToImageModule
from memfree.training import Checkpoints, ExponentialMovingAverage

NETWORK = NetworkOptions([8, 8], [False, True], 1, 4, 4, dropout=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training digits, 10 held-out ones."""
    out = tmp_path_factory.mktemp("validation") / "digits"
    prepare(out, parts=PartSizes(train=40, calibration=20, test=10, fit=10))
    return str(out)


def module_of(**options):
    rate = {"warmup_steps": 2, "learning_rate_schedule": "constant"}  # whatever max_steps is
    given = ModelOptions(network=NETWORK, ema_decay=0.8, **rate, **options)
    return DDPMModule(given, (1, 8, 8), 10)


def validated(make_trainer, module, data, callbacks=(), **options):
    (found,) = make_trainer(list(callbacks), **options).validate(module, data, verbose=False)
    return found["val/loss"]


@pytest.mark.parametrize("conditional", [False, True])
def test_the_loss_is_that_of_fixed_levels_and_noise(make_trainer, folder, conditional):
    module, data = module_of(class_conditional=conditional), ShardDataModule(folder, batch_size=4)
    loss = validated(make_trainer, module, data)
    assert validated(make_trainer, module, data) == loss
    other = ShardDataModule(folder, batch_size=7, seed=3)
    assert validated(make_trainer, module, other) == pytest.approx(loss, rel=1e-5)
    # By hand.
    part, errors = DatasetFolder(folder).part("test"), []
    module.eval()
    for row, label, x_0 in zip(part.rows.tolist(), part.labels, part.images(), strict=True):
        generator = np.random.Generator(np.random.PCG64([row, 14]))
        for share in VALIDATED_AT:
            t = torch.tensor([round(share * 999)])
            noise = torch.from_numpy(generator.standard_normal((1, 1, 8, 8), np.float32))
            a = module.alphas_cumprod[t]
            x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
            with torch.no_grad():
                given = label[None] if conditional else None
                prediction = module.network(x_t, t, class_labels=given).sample
            target = training_target(x_0[None], noise, a, "epsilon")
            errors.append(float((prediction - target).square().mean()))
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_validation_within_a_training_changes_nothing_and_is_of_the_average(
    make_trainer, folder, tmp_path
):
    def fit(path, checkpoint=None, **options):
        module, average = module_of(), ExponentialMovingAverage(0.8)
        callbacks = [average, Checkpoints(tmp_path / path, 2)]
        data = ShardDataModule(folder, batch_size=16)  # three batches an epoch
        trainer = make_trainer(callbacks, **{"max_steps": 8, **options})
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return trainer, module, average

    _, plain, _ = fit("plain", limit_val_batches=0)
    trainer, module, average = fit("a")
    assert difference(plain.state_dict(), module.state_dict()) is None
    assert "val/loss" in trainer.callback_metrics
    data = ShardDataModule(folder, batch_size=16)
    (found,) = trainer.validate(module, data, verbose=False)
    assert found["val/loss"] == validated(make_trainer, average.average, data)
    # Stopped within an epoch, at its end, and where a validation is due.
    for stop in (2, 4, 6):
        fit(f"b{stop}", max_steps=stop)
        checkpoint = tmp_path / f"b{stop}" / f"step-{stop:08d}.ckpt"
        _, resumed, _ = fit(f"c{stop}", checkpoint)
        assert difference(plain.state_dict(), resumed.state_dict()) is None, stop


def test_ranks_share_the_images_out_and_none_is_without(folder):
    part = DatasetFolder(folder).part("test")
    rows = [
        row
        for rank in range(3)
        for batch in PartLoader(part, 2, rank, 3, "stop")
        for row in batch["row"].tolist()
    ]
    assert sorted(rows) == part.rows.tolist()
    assert [len(PartLoader(part, 2, rank, 3, "stop")) for rank in range(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="10 test images cannot feed 11 ranks"):
        PartLoader(part, 2, 0, 11, "stop")


def test_a_broken_image_stops_validation_or_is_left_out(make_trainer, folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "broken")
    record = DatasetFolder(folder).part_records("test").to_pylist()[0]
    shard = tmp_path / "broken" / record["shard"]
    data = bytearray(shard.read_bytes())
    data[record["offset"] + record["size"] - 20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="damaged, its checksum differs"):
        validated(make_trainer, module_of(), ShardDataModule(str(tmp_path / "broken"), 4))
    skipping = ShardDataModule(str(tmp_path / "broken"), 4, on_error="skip")
    assert validated(make_trainer, module_of(), skipping) > 0
    assert sum("checksum differs" in message for message in caplog.messages) == 1
    batches = list(skipping.val_dataloader())
    assert [len(batch["image"]) for batch in batches] == [3, 4, 2]
    assert record["row"] not in [row for batch in batches for row in batch["row"].tolist()]


def test_data_without_a_test_part_trains_without_validation(make_trainer, folder, tmp_path):
    shards = ShardDataModule(
        f"{folder}/*.tar", 16, stream=StreamOptions(epoch_records=32, image_size=8, channels=1)
    )
    make_trainer([], max_steps=3, enable_checkpointing=False).fit(module_of(), shards)
    with pytest.raises(ValueError, match=r"no test part .* --parts\.test"):
        validated(make_trainer, module_of(), shards)


@pytest.mark.parametrize("name", ["lora_rank", "train_text_encoder", "cache"])
def test_a_text_model_is_validated_before_and_within_training(make_trainer, name):
    """What the caches keep from inference mode must do for training too."""
    options = ModelOptions(finetune=FineTuneOptions(**{name: 2 if name == "lora_rank" else True}))
    module = TextToImageModule(options, tiny_pipeline(), (3, 8, 8))
    records = [
        {"image": torch.full((3, 8, 8), n / 9), "caption": CAPTIONS[n % 2], "row": n}
        for n in range(6)
    ]
    train, held_out = (DataLoader(records[part], batch_size=2) for part in (slice(4), slice(2, 6)))
    trainer = make_trainer([], max_steps=4, enable_checkpointing=False)
    before = trainer.validate(module, held_out, verbose=False)
    assert before == make_trainer([]).validate(module, held_out, verbose=False)
    trainer.fit(module, train, held_out)
    assert float(trainer.callback_metrics["val/loss"]) != before[0]["val/loss"]


WORDS = [
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.layers_per_block=1",
    "--model.network.norm_num_groups=4",
    "--model.warmup_steps=2",
    "--data.batch_size=16",
    "--trainer.max_steps=6",
    "--trainer.log_every_n_steps=2",
    "--trainer.sample_grid_every_n_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
]


def test_memfree_train_validates_on_request_alone(folder, tmp_path):
    every = "--trainer.val_check_interval=2"
    for name, more in (("plain", []), ("validated", [every])):
        words = [f"--data.path={folder}", f"--out={tmp_path / name}", *WORDS, *more]
        entry.run(train, words)
    plain, other = (trained_state(tmp_path / name) for name in ("plain", "validated"))
    for state in (plain, other):
        state["log"], state["files"] = state["files"][0], state["files"][1:]
    logs = [
        list(csv.DictReader(state.pop("log").decode().splitlines())) for state in (plain, other)
    ]
    assert difference(plain, other) is None
    assert all("val/loss" not in row for row in logs[0])
    steps = [row["step"] for row in logs[1] if row["val/loss"]]
    assert steps == ["1", "3", "5"]
    rest = [{k: v for k, v in row.items() if k != "val/loss"} for row in logs[1] if row["loss"]]
    assert rest == logs[0]


class Killed(BaseException):
    """Ends a training as a kill does."""


def test_a_validated_training_resumes_as_if_it_had_not_been_stopped(folder, tmp_path, monkeypatch):
    """Killed after the validation that came with the last checkpoint, at step 4."""
    every = ["--trainer.val_check_interval=2", "--trainer.checkpoint_every_n_steps=2"]

    def run(name):
        entry.run(train, [f"--data.path={folder}", f"--out={tmp_path / name}", *WORDS, *every])
        return trained_state(tmp_path / name)

    step = DDPMModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.global_step == 4:
            raise Killed
        return step(self, batch, batch_idx)

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DDPMModule, "training_step", stopping)
        patch.setattr("memfree.training.loggers.LossLog.finalize", lambda self, status: None)
        run("stopped")
    assert difference(whole, run("stopped")) is None


def test_memfree_train_refuses_to_validate_without_a_test_part(folder, tmp_path, capsys):
    words = [f"--data.path={folder}/*.tar", f"--out={tmp_path / 'out'}", *WORDS]
    words += ["--data.stream.epoch_records=32", "--data.stream.image_size=8"]
    words += ["--data.stream.channels=1", "--trainer.val_check_interval=2"]
    with pytest.raises(SystemExit) as exit_:
        entry.run(train, words)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--trainer.val_check_interval" in said
    assert not (tmp_path / "out").exists()
