"""Checkpoints that survive a kill, and saving before preemption."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
import weakref
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from memfree.console import say
from memfree.folders.atomic import write_atomic
from memfree.folders.untrusted import check_plain, short
from memfree.models.module import CHECKPOINT_KEY
from memfree.slurm.requeue import WARNINGS, handled, ignore, job_id, requeue


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; Lightning's copies from a temporary folder on another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; ``storage_options`` are Lightning's and unused."""

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)

        write_atomic(Path(path), save)


class Checkpoints(ModelCheckpoint):
    """Saves ``folder/step-N.ckpt`` every N optimizer steps and at the end; keeps the newest."""

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        super().__init__(dirpath=folder, every_n_train_steps=every_n_steps, save_top_k=1)
        self._every = every_n_steps
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the existing checkpoint, which the next one replaces."""
        super().setup(trainer, pl_module, stage)
        newest = latest_checkpoint(Path(str(self.dirpath)))
        self.best_model_path = str(newest or "")
        # Otherwise a batch that still accumulates gradients would save that step again without
        # them.
        self._saved_step = step_of(newest) if newest else 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save when due, or before Lightning counts an epoch cut short by max_steps as complete."""
        step = trainer.global_step
        if step % self._every == 0 or step == trainer.max_steps:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save this step unless it is saved."""
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trial or trainer.global_step == self._saved_step:
            return
        for logger in trainer.loggers:  # a run resumed from here does not log it again
            logger.save()
        previous = self.best_model_path
        path = str(Path(str(self.dirpath)) / f"step-{trainer.global_step:08d}.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        self.best_model_path, self._saved_step = path, trainer.global_step
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))
        # May be from the resumed run.
        if previous and previous != path:
            trainer.strategy.remove_checkpoint(previous)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the folder itself shows the newest checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-{8 * '[0-9]'}.ckpt"))


def step_of(path: Path) -> int:
    """Optimizer steps taken before this checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in ``folder``, or None."""
    return next(reversed(_checkpoints(folder)), None)


def good_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint or None (a kill can leave two); ValueError if all are bad."""
    damage: ValueError | None = None
    for path in reversed(_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return path
        except FileNotFoundError:  # the first process has just removed it
            pass
        except ValueError as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def keep_only(path: Path, folder: Path) -> None:
    """Remove all other checkpoints from ``folder``, older or damaged."""
    for other in _checkpoints(folder):
        if other != path:
            other.unlink(missing_ok=True)


def verify_checkpoint(path: Path) -> None:
    """Verify the checksums in a checkpoint; ValueError if it was cut off or changed."""
    check_plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_packed(archive)
            wrong = archive.testzip()
    except Exception as error:  # whatever an untrusted archive makes zipfile raise
        of_the_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_the_disk:
            raise
        raise _damaged(path, type(error).__name__) from error
    if wrong is not None:
        raise _damaged(path, f"wrong checksum of {short(wrong)}")


def read_identity(path: Path) -> dict[str, Any]:
    """Identity of a checkpoint's model, read without executing anything; ValueError if damaged."""
    check_plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_packed(archive)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript file, which is refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        identity = checkpoint[CHECKPOINT_KEY]
    except Exception as error:  # whatever an untrusted pickle makes torch raise
        raise _damaged(path, type(error).__name__) from error
    if not isinstance(identity, dict):
        raise ValueError(f"{path} does not say which model it is of: use another --out")
    return identity


def _refuse_packed(archive: zipfile.ZipFile) -> None:
    """torch neither compresses nor encrypts; an untrusted archive may be a zip bomb."""
    encrypted = 0x1
    for part in archive.infolist():
        if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & encrypted:
            raise ValueError("packed")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged or not a checkpoint of memfree ({reason}): "
        "delete it, or use another --out"
    )


class Preemption(Callback):
    """On SIGTERM, USR1 or Ctrl-C, saves a checkpoint after the optimizer step and ends the process.

    The handler only records the signal: a checkpoint inside it would wait for ranks that received
    none. Ranks agree after a step (on several GPUs every ``every_n_steps``, since it waits for
    them). Under SLURM the first process then requeues the job. The exit status is 128 + signal (143
    for SIGTERM); a second Ctrl-C ends the process at once.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        self.every_n_steps = every_n_steps
        self._signal: int | None = None
        self._step = 0
        self._handlers = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, also in place of Lightning's SIGTERM handler."""
        self._signal, self._step = None, trainer.global_step
        numbers = [*WARNINGS]
        # Ctrl-C only with a terminal: jobs have none, background processes ignore it.
        if job_id() is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        self._handlers.enter_context(handled(self._remember, numbers))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handlers; resend a late signal in a SLURM job before a long export."""
        self._handlers.close()
        if self._signal is not None and job_id() is not None:
            os.kill(os.getpid(), self._signal)

    def on_exception(self, *_: Any) -> None:
        """Restore the signal handlers."""
        self._handlers.close()

    def _remember(self, number: int, *_: object) -> None:
        self._signal = self._signal or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Agree whether to end after a completed optimizer step."""
        step = trainer.global_step
        # No checkpoint holds partly accumulated gradients; after the last step, the end of the fit
        # passes the signal on.
        if step == self._step or _is_last(trainer):
            return
        self._step = step
        on_cpu = pl_module.device.type == "cpu"
        if trainer.world_size > 1 and not on_cpu and step % self.every_n_steps:
            return
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.on_train_end(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier("the checkpoint is written")
        # If only another rank has the signal, it is on its way to this one.
        number = self._signal or signal.SIGTERM
        name = signal.Signals(number).name
        what = "interrupted" if number == signal.SIGINT else f"received {name}"
        saved = f"memfree: {what}: saved step {trainer.global_step}"
        if job_id() is not None:
            _end_job(trainer, saved, 128 + number)
        if trainer.is_global_zero:
            say(f"{saved}; the same command resumes from there", stderr=True)
        launcher = trainer.strategy.launcher
        # The first process kills itself when one that it started fails.
        raise SystemExit(0 if launcher is not None and trainer.local_rank > 0 else 128 + number)


def _end_job(trainer: Trainer, saved: str, status: int) -> NoReturn:
    ignore()  # requeueing ends this job by another SIGTERM
    if trainer.is_global_zero:
        reason = requeue()
        what = "the job is requeued" if reason is None else f"not requeued: {reason}"
        say(f"{saved}; {what}", stderr=True)
    # SLURM may end a job when its first task ends, even before it is requeued.
    trainer.strategy.barrier("the job is requeued")
    for logger in trainer.loggers:
        logger.finalize("preempted")
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip Lightning's teardown: it takes time that SLURM may not give.
    os._exit(status)


def _is_last(trainer: Trainer) -> bool:
    last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_batch and last_epoch)
