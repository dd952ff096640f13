"""Lightning's Trainer, with a refusal of its options as one line that names them."""

from __future__ import annotations

import re
import signal
import threading
import warnings
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from memfree.quiet import SRUN_UNUSED

_DEVICES = {
    "accelerator": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
}
"""Arguments of the Trainer that are options ``--trainer.*`` of a command, and their defaults."""
_SENTENCE_WITH_ADDRESS = re.compile(r"[^.]*https?://\S*")


def build_trainer(**options: Any) -> Trainer:
    """Make a Trainer; call it before anything is written, as it refuses what is not there.

    Args:
        options: arguments of the Trainer.

    Raises:
        ValueError: there is no such device or strategy here; names the options that were given.
    """
    try:
        return Trainer(
            **{
                **options,
                "callbacks": [PlainTermination(), *options.get("callbacks", [])],
                "plugins": [*options.get("plugins", []), *_slurm()],
            }
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        given = [
            f"--trainer.{name} {options[name]}"
            for name, default in _DEVICES.items()
            if options.get(name, default) != default
        ]
        raise ValueError(f"{' '.join(given)}: {first_line(error)}".removeprefix(": ")) from error


class PlainTermination(Callback):
    """Keeps the handler of SIGTERM that was there before Lightning's.

    Lightning's talks to the other ranks inside the handler, which they may never answer, and lets
    a prediction run on.
    """

    def __init__(self) -> None:
        self._handler: Any = signal.SIG_DFL

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the handler."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        self._put_back()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        self._put_back()

    def _put_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


def _slurm() -> list[SLURMEnvironment]:
    """Lightning's knowledge of SLURM without its requeueing, under SLURM.

    That saves a checkpoint inside a signal handler, where ranks may wait for each other for ever;
    ours is ``memfree.models.preemption``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SRUN_UNUSED)
        return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def first_line(error: Exception) -> str:
    """The first line of a message of Lightning's, without addresses and code marks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _SENTENCE_WITH_ADDRESS.sub("", lines[0]).replace("`", "").strip()
