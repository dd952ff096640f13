"""What loggers get of a training, and W&B's logger, whose package need not be there."""

import csv

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from memfree.training import loggers
from memfree.training.loggers import LossLog, LossRecord, build_logger, check_logger, finish


class FakeWandb:
    """Stands for WandbLogger: keeps its arguments."""

    ended = 0

    def __init__(self, **given):
        self.given = given

    @property
    def experiment(self):
        return self

    def finish(self):
        FakeWandb.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loggers, "WandbLogger", FakeWandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--trainer.logger {name} .* install memfree\[{name}\]"):
        check_logger(name)
    check_logger("csv")


def test_a_wandb_run_names_the_folder_and_goes_on_when_resumed(wandb, tmp_path, monkeypatch):
    out = tmp_path / "class-x64-seed1" / "model"
    first = build_logger("wandb", out, "logs").given
    assert first["name"] == "class-x64-seed1/model"
    assert first["config"] == {"folder": str(out)}
    assert first["project"] == "memfree" and first["save_dir"] == out / "logs"
    assert build_logger("wandb", out, "logs").given["version"] == first["version"]
    other = build_logger("wandb", tmp_path / "other", "logs").given
    assert other["version"] != first["version"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert build_logger("wandb", out, "logs").given["project"] == "mine"


def test_the_next_training_has_a_run_of_its_own(wandb, tmp_path):
    before = FakeWandb.ended
    finish(build_logger("wandb", tmp_path, "logs"))
    finish(build_logger("csv", tmp_path, "logs"))
    finish(build_logger("none", tmp_path, "logs"))
    assert FakeWandb.ended == before + 1


def test_tensorboard_goes_on_with_one_log(tmp_path):
    """What was logged behind the step that training goes on from does not count any more."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, end, loss in ((0, 4, 1.0), (2, 6, 2.0)):
        logger = build_logger("tensorboard", tmp_path, "logs", start)
        for step in range(start, end):
            logger.log_metrics({"loss": loss}, step)
        logger.finalize("success")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "version_0")).Reload()
    found = [(one.step, one.value) for one in events.Scalars("loss")]
    assert found == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_the_loss_of_a_step_is_a_metric_of_the_trainer_and_its_loggers(
    make_module, make_trainer, data, tmp_path
):
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            assert trainer.callback_metrics["train/loss"] == outputs["loss"]
            losses.append(float(outputs["loss"]))

    logger = CSVLogger(tmp_path, name="logs")
    options = {"max_steps": 4, "log_every_n_steps": 2, "enable_checkpointing": False}
    trainer = make_trainer([Losses()], logger=logger, **options)
    trainer.fit(make_module(), data)
    assert float(trainer.callback_metrics["train/loss"]) == losses[-1]
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(losses[1::2], rel=1e-5)


def test_our_own_record_has_the_mean_alone(make_module, make_trainer, data, tmp_path):
    """A column more, or a row, would make the log of a resumed training another one."""
    logger = LossLog(tmp_path)
    options = {"max_steps": 4, "log_every_n_steps": 2, "enable_checkpointing": False}
    trainer = make_trainer([LossRecord(2)], logger=logger, **options)
    trainer.fit(make_module(), data)
    assert trainer.callback_metrics["train/loss"] == trainer.callback_metrics["loss"]
    with open(logger.path) as file:
        rows = list(csv.DictReader(file))
    assert [set(row) for row in rows] == 2 * [{"epoch", "learning_rate", "loss", "step"}]
    assert [row["step"] for row in rows] == ["1", "3"]
