"""LightningCLI builds the modules, trains them, and its checkpoints load."""

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from tiny_text import tiny_pipeline

from memfree.commands.prepare import prepare
from memfree.data import PartSizes, ShardDataModule
from memfree.models import DDPMModule
from memfree.models.text_to_image import TextToImageModule


@pytest.fixture
def built(tmp_path):
    def build(kind, *more, **options):
        prepare(tmp_path / "digits", parts=PartSizes(train=20, calibration=20, test=10, fit=10))
        args = [
            "--model.image_shape=[1, 8, 8]",
            "--model.options.network.block_out_channels=[8, 8]",
            "--model.options.network.attention=[false, true]",
            "--model.options.network.norm_num_groups=4",
            "--model.options.learning_rate=0.01",
            f"--data.path={tmp_path / 'digits'}",
            "--data.batch_size=10",
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
            *more,
        ]
        return LightningCLI(kind, ShardDataModule, run=False, args=args, **options)

    return build


@pytest.mark.parametrize("averages", [False, True])
def test_it_builds_and_trains_a_module(built, tmp_path, averages):
    average = ["--trainer.callbacks+=memfree.training.ExponentialMovingAverage"]
    average += ["--trainer.callbacks.decay=0.8"]
    cli = built(DDPMModule, *(average if averages else []))
    assert cli.model.options.network.block_out_channels == [8, 8]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert {"train/loss", "val/loss"} <= cli.trainer.callback_metrics.keys()
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = DDPMModule.load_from_checkpoint(path)
    assert loaded.identity() == cli.model.identity()
    expected = cli.model.average or cli.model
    assert loaded.has_averaged_weights == averages
    pairs = zip(loaded.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_builds_a_text_to_image_module_by_the_name_of_its_pipeline(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    args = ["--model.image_shape=[3, 8, 8]", "--model.seed=3"]
    args += [f"--model.options.pretrained={tmp_path / 'base'}", "--trainer.accelerator=cpu"]
    args += [f"--trainer.default_root_dir={tmp_path}"]
    args += ["--model.options.finetune.lora_rank=2"]
    module = LightningCLI(TextToImageModule, run=False, args=args).model
    assert module.seed == 3 and module.options.finetune.lora_rank == 2
    assert all("lora" in name for name, one in module.named_parameters() if one.requires_grad)
