"""The share of copies among a few samples at each validation of a training."""

import csv

import pytest
import torch
from tiny_training import make_trainer
from trained_state import difference

from memfree.cli import entry
from memfree.commands.prepare import prepare
from memfree.commands.train import train
from memfree.data import PartSizes, ShardDataModule
from memfree.guidance import NormalizedL2, calibrate, calibration_of
from memfree.models import DDPMModule, ModelOptions, NetworkOptions
from memfree.retrieval import ReferenceIndex
from memfree.sampling import CopyRate
from memfree.training import ExponentialMovingAverage

__all__ = ["make_trainer"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("copy-rate") / "digits"
    prepare(out, parts=PartSizes(train=40, calibration=20, test=10, fit=10))
    return str(out)


def module_of():
    torch.manual_seed(0)
    network = NetworkOptions([8, 8], [False, True], 1, 4, 4)
    rate = {"warmup_steps": 2, "learning_rate_schedule": "constant"}
    return DDPMModule(ModelOptions(network=network, ema_decay=0.8, **rate), (1, 8, 8), 10)


def index_of(images):
    """References far from all samples, and these."""
    generator = torch.Generator().manual_seed(1)
    references = torch.randint(0, 2, (60, 1, 8, 8), generator=generator) * 2.0 - 1
    index = ReferenceIndex.build(torch.cat([references, images]))
    held_out = torch.randint(0, 2, (100, 1, 8, 8), generator=generator) * 2.0 - 1
    calibrate(index, NormalizedL2(), held_out, 0.05)
    return index


def share_of_copies(index, samples):
    """By p-values."""
    similarity = NormalizedL2()
    p = calibration_of(index, similarity).p_values(similarity(index, samples).sigma)
    return float((p <= 0.05).double().mean())


def test_it_counts_the_samples_that_are_in_the_index(make_trainer, data):
    module = module_of()
    samples = module.preview(8, 5, seed=3)
    options = {"count": 8, "steps": 5, "seed": 3, "false_positive_rate": 0.05}
    for known in (0, 3, 8):
        callback = CopyRate(index_of(samples[:known]), **options)
        found = make_trainer([callback]).validate(module, ShardDataModule(data, 4), verbose=False)
        assert found[0]["val/copy_rate"] == pytest.approx(
            share_of_copies(callback.judge.index, samples)
        )
        if known in (0, 8):
            assert found[0]["val/copy_rate"] == known / 8
    with pytest.raises(ValueError, match="false_positive_rate 0.01 cannot be calibrated on 100"):
        CopyRate(index_of(samples))


def test_it_is_of_the_average_and_changes_no_training(make_trainer, data):
    def fit(*callbacks):
        module, average = module_of(), ExponentialMovingAverage(0.8)
        trainer = make_trainer([average, *callbacks], max_steps=6, check_val_every_n_epoch=1)
        trainer.fit(module, ShardDataModule(data, batch_size=16))
        return trainer, module, average.average

    _, plain, average = fit()
    index = index_of(average.preview(4, 5, 0))
    options = {"count": 4, "steps": 5, "false_positive_rate": 0.05}
    trainer, module, _ = fit(CopyRate(index, **options))
    assert float(trainer.callback_metrics["val/copy_rate"]) == 1.0
    assert difference(plain.state_dict(), module.state_dict()) is None


WORDS = [
    "--model.network.block_out_channels=[8, 8]",
    "--model.network.attention=[false, true]",
    "--model.network.norm_num_groups=4",
    "--data.batch_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_steps=4",
    "--trainer.sample_grid_every_n_steps=0",
]


def test_memfree_train_records_it_on_request(data, tmp_path, capsys):
    index, out = tmp_path / "index", tmp_path / "out"
    built = index_of(torch.rand(4, 1, 8, 8) * 2 - 1)
    calibrate(built, NormalizedL2(), torch.rand(600, 1, 8, 8) * 2 - 1)
    built.save(index)
    words = [f"--data.path={data}", f"--out={out}", *WORDS, f"--trainer.copy_rate_index={index}"]
    with pytest.raises(SystemExit):
        entry.run(train, words)
    assert "--trainer.copy_rate_index: pass --trainer.val_check" in capsys.readouterr().err
    entry.run(train, [*words, "--trainer.val_check_interval=2"])
    (log,) = out.glob("logs/**/metrics.csv")
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [row["step"] for row in rows if row["val/copy_rate"]] == ["1", "3"]
