"""Average, checkpoints, refusal of what is not finite, grids and records of the loss."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from rich.console import Console

from memfree.models import DDPMModule
from memfree.training import ExponentialMovingAverage, FiniteTraining, SampleGrid
from memfree.training.callbacks import StepProgress
from memfree.training.checkpoints import Checkpoints, latest_checkpoint, read_identity, step_of
from memfree.training.loggers import LossRecord


class Recorder(pl.Callback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(flat(pl_module.network))


def flat(network):
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


def stopped_at(step):
    """A callback that ends the process's training as a kill would, after this step."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                raise InterruptedError("killed")

    return Stop()


def test_average_equals_numpy(make_module, make_trainer, data):
    module, average, recorder = make_module(), ExponentialMovingAverage(0.8), Recorder()
    expected = flat(module.network)
    trainer = make_trainer([average, recorder], max_steps=6, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    for weights in recorder.weights:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(flat(average.average.network), expected, rtol=0, atol=1e-6)
    # The module itself goes on with its own weights.
    torch.testing.assert_close(flat(module.network), recorder.weights[-1], rtol=0, atol=0)
    assert module.average is average.average
    # Pipelines have the average, unless asked for the others; neither is saved nor trained twice.
    torch.testing.assert_close(flat(module.pipeline().unet), flat(average.average.network))
    assert torch.equal(flat(module.pipeline(averaged=False).unet), recorder.weights[-1])
    assert module.state_dict().keys() == make_module().state_dict().keys()
    # Weights that are trained on without an average have none that is out of date.
    make_trainer([], max_steps=2, enable_checkpointing=False).fit(module, datamodule=data)
    assert module.average is None
    assert torch.equal(flat(module.pipeline().unet), flat(module.network))


def test_average_ignores_batches_without_a_step(make_module, make_trainer, data):
    module, average, recorder = make_module(), ExponentialMovingAverage(0.5), Recorder()
    start = flat(module.network)
    options = {"max_steps": 2, "accumulate_grad_batches": 2, "enable_checkpointing": False}
    make_trainer([average, recorder], **options).fit(module, datamodule=data)
    assert len(recorder.weights) == 4
    expected = 0.25 * start + 0.25 * recorder.weights[1] + 0.5 * recorder.weights[3]
    torch.testing.assert_close(flat(average.average.network), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [5, 7, 8])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_module, make_trainer, data, tmp_path, dropout, stop
):
    """Stopped within an epoch (4 batches), after a checkpoint (every 2), and at its end."""

    def run(folder, *more):
        module, average = make_module(dropout=dropout), ExponentialMovingAverage(0.8)
        torch.manual_seed(123 + stop)
        callbacks = [average, Checkpoints(folder, 2), *more]
        trainer = make_trainer(callbacks, max_steps=10)
        path = latest_checkpoint(folder)
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return flat(module.network), flat(average.average.network)

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", stopped_at(stop))
    # The stop comes before that step's own checkpoint, as callbacks that save come last.
    assert step_of(latest_checkpoint(tmp_path / "cut")) == 2 * ((stop - 1) // 2)
    resumed = run(tmp_path / "cut")
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-00000010.ckpt"]


def test_the_last_step_is_saved_once(make_module, make_trainer, data, tmp_path):
    trainer = make_trainer([Checkpoints(tmp_path / "c", 4)], max_steps=6)
    trainer.fit(make_module(), datamodule=data)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000006.ckpt"]
    checkpoint = torch.load(tmp_path / "c" / "step-00000006.ckpt", weights_only=True)
    # Stopped by max_steps in the second epoch, which therefore is not over.
    assert checkpoint["epoch"] == 1
    trainer = make_trainer([Checkpoints(tmp_path / "d", 4)], max_epochs=2, max_steps=-1)
    trainer.fit(make_module(), datamodule=data)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["step-00000008.ckpt"]


def test_a_checkpoint_of_another_model_is_refused(make_module, make_trainer, data, tmp_path):
    make_trainer([Checkpoints(tmp_path, 2)], max_steps=2).fit(make_module(), datamodule=data)
    path = latest_checkpoint(tmp_path)
    other = make_module(learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.001 there and 0\.5 here"):
        make_trainer([], max_steps=4).fit(other, datamodule=data, ckpt_path=path, weights_only=True)
    assert read_identity(path) == make_module().identity()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no zip at all" * 100])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "step-00000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="step-00000001.ckpt is damaged"):
        read_identity(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("touched").touch, ())

    path = tmp_path / "step-00000001.ckpt"
    torch.save({"memfree": {}, "state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        read_identity(path)
    assert not (tmp_path / "touched").exists()


class Poison(pl.Callback):
    """Makes the images of one step NaN, or the weights after it infinite."""

    def __init__(self, step, weights=False):
        self.step, self.weights = step, weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.weights:
            batch["image"].fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and self.weights:
            pl_module.network.conv_in.weight.data.fill_(float("inf"))


def test_a_loss_that_is_nan_stops_and_keeps_the_last_checkpoint(
    make_module, make_trainer, data, tmp_path
):
    callbacks = [FiniteTraining(50), Poison(4), Checkpoints(tmp_path, 2)]
    with pytest.raises(ValueError, match="NaN or infinite by step 5; .*step-00000004.ckpt is the"):
        make_trainer(callbacks, max_steps=9).fit(make_module(), datamodule=data)
    assert step_of(latest_checkpoint(tmp_path)) == 4


def test_weights_that_are_infinite_are_not_saved(make_module, make_trainer, data, tmp_path):
    callbacks = [FiniteTraining(50), Poison(4, weights=True), Checkpoints(tmp_path, 2)]
    with pytest.raises(ValueError, match="NaN or infinite by step 4"):
        make_trainer(callbacks, max_steps=9).fit(make_module(), datamodule=data)
    assert step_of(latest_checkpoint(tmp_path)) == 2


def test_nan_before_the_first_checkpoint(make_module, make_trainer, data, tmp_path):
    callbacks = [FiniteTraining(50), Poison(0), Checkpoints(tmp_path, 2)]
    with pytest.raises(ValueError, match="no checkpoint was saved yet; lower --model.learning"):
        make_trainer(callbacks, max_steps=9).fit(make_module(), datamodule=data)
    assert latest_checkpoint(tmp_path) is None


def test_grids_show_the_same_noise_by_the_averaged_weights(
    make_module, make_trainer, data, tmp_path
):
    module, grid = make_module(dropout=0.5), SampleGrid(tmp_path / "grids", 2, count=4, steps=3)
    average = ExponentialMovingAverage(0.8)
    callbacks = [average, grid]
    make_trainer(callbacks, max_steps=3, enable_checkpointing=False).fit(module, datamodule=data)
    names = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert names == ["samples-0000002.png", "samples-0000003.png"]
    with Image.open(tmp_path / "grids" / names[0]) as image:
        assert image.size == (2 * 4 + 3 * 2, 2 * 4 + 3 * 2)
    images = average.average.preview(grid.count, grid.steps, grid.seed)
    assert images.shape == (4, 1, 4, 4)
    assert torch.equal(images, average.average.preview(grid.count, grid.steps, grid.seed))
    assert average.average.network.training


def test_the_recorded_loss_is_the_mean_since_the_last_record(
    make_module, make_trainer, data, tmp_path
):
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(float(outputs["loss"]))

    logger = CSVLogger(tmp_path, name="logs")
    record = LossRecord(3)
    assert record.last() is None
    callbacks = [Losses(), record]
    options = {"max_steps": 7, "log_every_n_steps": 3, "enable_checkpointing": False}
    make_trainer(callbacks, logger=logger, **options).fit(make_module(), datamodule=data)
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 5]
    found = [float(row["loss"]) for row in rows]
    assert found == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3], rel=1e-5)
    assert [float(row["learning_rate"]) for row in rows][-1] < 1e-3
    assert record.last() == pytest.approx(found[-1])

    few = LossRecord(50)
    options["max_steps"] = 2
    make_trainer([few], **options).fit(make_module(), datamodule=data)
    assert few.last() == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_counts_steps_over_all_epochs(
    make_module, make_trainer, data, tmp_path, terminal, monkeypatch
):
    monkeypatch.setattr("memfree.console.PLAIN_INTERVAL", 0.0)
    with open(tmp_path / "screen", "w+") as file:
        console = Console(file=file, force_terminal=terminal, width=100)
        callbacks = [LossRecord(5), StepProgress(console)]
        options = {"max_steps": 20, "enable_checkpointing": False, "log_every_n_steps": 5}
        trainer = make_trainer(callbacks, **options)
        trainer.fit(make_module(), datamodule=data)
        file.seek(0)
        text = file.read()
    assert ("20/20" if terminal else "step 20 of 20, loss") in text
    assert "loss 0." in text or "loss 1." in text


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(make_module, make_trainer, data, precision):
    norms = []

    class Norms(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            squares = [p.grad.square().sum() for p in pl_module.parameters()]
            norms.append(float(torch.stack(squares).sum().sqrt()))

    options = {"max_steps": 3, "gradient_clip_val": 0.01, "enable_checkpointing": False}
    trainer = make_trainer([Norms()], precision=precision, **options)
    trainer.fit(make_module(), datamodule=data)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_a_compiled_network_is_averaged_and_saved_under_its_own_names(
    make_module, make_trainer, data, monkeypatch
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, *_, **__: compiled.append(call) or call)
    module, average = make_module(compile=True), ExponentialMovingAverage(0.8)
    assert len(compiled) == 1
    trainer = make_trainer([average], max_steps=2, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    assert set(average.average.state_dict()) == set(make_module().state_dict())


def test_a_module_is_itself_after_a_checkpoint(make_module, make_trainer, data, tmp_path):
    module = make_module()
    callbacks = [ExponentialMovingAverage(0.8), Checkpoints(tmp_path, 2)]
    make_trainer(callbacks, max_steps=4).fit(module, datamodule=data)
    state = torch.load(latest_checkpoint(tmp_path), weights_only=True)["state_dict"]
    assert isinstance(module, DDPMModule)
    assert set(state) == set(module.state_dict())
