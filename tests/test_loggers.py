"""The logger of W&B, whose package need not be there."""

import pytest

from memfree.models import loggers
from memfree.models.loggers import build_logger, check_logger, finish


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
