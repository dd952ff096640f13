"""A tiny network, tiny data and a tiny trainer for the tests of this package."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from memfree.models import DDPMModule, ModelOptions, NetworkOptions, NoiseOptions

SHAPE = (1, 4, 4)
CLASSES = 3


class Labelled(Dataset):
    """Twenty random images with labels."""

    def __init__(self):
        self.images = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return {"image": self.images[row], "label": torch.tensor(row % CLASSES)}


class InOrder(Sampler):
    """Records in an order of (epoch); goes on within an epoch where a trainer resumes."""

    def __init__(self):
        self.trainer: pl.Trainer | None = None

    def __len__(self):
        return 20

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)
        order = torch.randperm(20, generator=generator).tolist()
        return iter(order[5 * self.trainer.fit_loop.epoch_loop.batch_progress.current.ready :])


class Resumable(DataLoader):
    """Tells Lightning that it can go on within an epoch."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class TinyData(pl.LightningDataModule):
    """Four batches of five images an epoch."""

    def train_dataloader(self):
        sampler = InOrder()
        sampler.trainer = self.trainer
        return Resumable(Labelled(), batch_size=5, sampler=sampler)


@pytest.fixture
def data():
    return TinyData()


@pytest.fixture
def make_module():
    def make(num_classes=CLASSES, seed=0, dropout=0.0, noise=None, **options):
        values = {
            "network": NetworkOptions([8, 8], [False, True], 1, 4, 4, dropout=dropout),
            "noise": noise or NoiseOptions(num_train_timesteps=50),
            "class_conditional": num_classes is not None,
            "warmup_steps": 2,
            "ema_decay": 0.8,
            **options,
        }
        return DDPMModule(ModelOptions(**values), SHAPE, num_classes, seed, {"hash": "h"})

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(callbacks, folder: Path = tmp_path, **options):
        values = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "use_distributed_sampler": False,
            **options,
        }
        return pl.Trainer(callbacks=callbacks, **values)

    return make
