"""Lightning Trainer set-up that refuses wrong options in one line."""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_only

from memfree.console import SRUN_UNUSED, quiet
from memfree.models.options import Devices
from memfree.slurm.launcher import LIGHTNING, Launch, check_meeting, joined, knows_mpi, launched

_DEVICES = {**asdict(Devices()), "precision": "32-true"}
"""Trainer arguments that are command options ``--trainer.*``, and their defaults."""
_OURS: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,  # ours are callbacks
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # data modules divide records among the ranks themselves
}
"""Defaults of ``build_trainer`` that differ from Lightning's."""
_SENTENCE_WITH_ADDRESS = re.compile(r"[^.]*https?://\S*")


def build_trainer(**options: Any) -> Trainer:
    """A Trainer with defaults ``_OURS``; ValueError names options that do not fit this machine."""
    launch, nodes = launched(), options.get("num_nodes", 1)
    # Without a launcher, Lightning counts devices itself.
    if launch.told:
        given = {name: options.get(name, "auto") for name in ("accelerator", "devices")}
        devices = device_count(launch, **given)
        together = joined(launch, devices, nodes)
        if together:
            options = {**options, "devices": _devices(options, devices)}
    else:
        together = nodes > 1
    callbacks = [PlainTermination(), *options.get("callbacks", [])]
    plugins = [*options.get("plugins", []), _environment(launch, together)]
    with _explained(options):
        trainer = Trainer(**{**_OURS, **options, "callbacks": callbacks, "plugins": plugins})
    if trainer.world_size > 1:
        check_meeting()
    if not together:
        # Lightning read it from the launcher's variables on import.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    return trainer


def device_count(
    launch: Launch, accelerator: str = "auto", devices: int | str | Sequence[int] = "auto"
) -> int:
    """Processes on this machine that options of a Trainer request, one per device.

    ``devices``: number, list such as ``0,1``, ``-1`` or ``auto`` (torchrun: all it started).
    """
    if means_all_started(launch, devices):
        return launch.per_node[0] if launch.per_node else launch.size or 1
    if str(devices).isdecimal() and int(str(devices)) > 0:
        return int(str(devices))
    given: dict[str, Any] = {"accelerator": accelerator, "devices": devices}
    with _explained(given), quiet():
        plain = {"plugins": [LightningEnvironment()], "enable_checkpointing": False}
        return Trainer(**{**_OURS, **plain, **given}).num_devices


def means_all_started(launch: Launch, devices: int | str | Sequence[int]) -> bool:
    """Whether ``devices`` means all that torchrun started rather than all of the machine."""
    return launch.launcher == "torchrun" and str(devices) in ("auto", "-1")


@contextmanager
def _explained(options: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        given = [
            f"--trainer.{name} {options[name]}"
            for name, default in _DEVICES.items()
            if options.get(name, default) != default
        ]
        raise ValueError(f"{' '.join(given)}: {first_line(error)}".removeprefix(": ")) from error


def _devices(options: Mapping[str, Any], count: int) -> Any:
    on_gpus = options.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    seen = CUDAAccelerator.auto_device_count() if on_gpus else 0
    if 0 < seen < count:
        raise ValueError(
            f"--trainer.devices {count}: this process sees {seen} GPU{'s' * (seen > 1)}, and each "
            "of those that work together must see all of its machine: ask SLURM for them with "
            "--gpus-per-node, not --gpus-per-task"
        )
    given = options.get("devices", "auto")
    return count if str(given) in ("auto", "-1") else given


class PlainTermination(Callback):
    """Keeps the earlier SIGTERM handler: Lightning's waits for ranks that may never answer."""

    def __init__(self) -> None:
        self._handler: Any = signal.SIG_DFL

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the earlier handler."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handler."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    on_predict_start = on_train_start


def _environment(launch: Launch, together: bool) -> ClusterEnvironment:
    """Lightning would join processes that are not one run, or wait for them forever."""
    if not together or launch.launcher == LIGHTNING:
        return LightningEnvironment()
    if launch.launcher == "srun":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SRUN_UNUSED)
            # Its requeueing saves a checkpoint inside a signal handler, where ranks may deadlock;
            # ours is Preemption.
            return SLURMEnvironment(auto_requeue=False)
    if launch.launcher == "jsrun":
        return LSFEnvironment()
    return MPIEnvironment() if knows_mpi(launch) else TorchElasticEnvironment()


def first_line(error: Exception) -> str:
    """First line of a Lightning message, without addresses and code marks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _SENTENCE_WITH_ADDRESS.sub("", lines[0]).replace("`", "").strip()
