"""Ends a training that is warned of its end: saved, requeued under SLURM, all ranks together."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from typing import Any, NoReturn

import lightning.pytorch as pl

from memfree.console import say
from memfree.models.checkpoints import Checkpoints
from memfree.requeue import WARNINGS, handled, ignore, job_id, requeue


class Preemption(pl.Callback):
    """On SIGTERM, USR1 or Ctrl-C: a checkpoint after the optimizer step, then the process ends.

    The handler only remembers the signal. Whether any rank has one is agreed on between the ranks
    after an optimizer step, where all of them stand at the same place; a checkpoint, which they
    write together, inside a handler would wait for ranks that have none. Under SLURM the first
    process then requeues the job, whose next start is the same command and goes on from that
    checkpoint.

    The process ends with status 128 + signal (143 for SIGTERM). A second Ctrl-C ends it at once.

    Args:
        every_n_steps: optimizer steps between two agreements of several ranks on GPUs, where each
            waits for the device; one process, and processes on CPUs, look after every step.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        self.every_n_steps = every_n_steps
        self._signal: int | None = None
        self._step = 0
        self._handlers = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, Lightning's handler of SIGTERM among them."""
        self._signal, self._step = None, trainer.global_step
        numbers = [*WARNINGS]
        # Ctrl-C where there is a terminal: jobs have none, what runs in the background ignores it.
        if job_id() is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        self._handlers.enter_context(handled(self._remember, numbers))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back, and one that came in the last steps as well.

        All is saved by now, but a large model takes longer to export than a warning leaves: inside
        a SLURM job, whoever had the signals before requeues it. Elsewhere the training ends by
        itself.
        """
        self._handlers.close()
        if self._signal is not None and job_id() is not None:
            os.kill(os.getpid(), self._signal)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._handlers.close()

    def _remember(self, number: int, *_: object) -> None:
        self._signal = self._signal or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Agree whether to end, if an optimizer step is done."""
        step = trainer.global_step
        # Gradients that are still being added up are in no checkpoint; the last step is followed
        # by the end in any case, which passes the signal on.
        if step == self._step or _is_last(trainer):
            return
        self._step = step
        on_cpu = pl_module.device.type == "cpu"
        if trainer.world_size > 1 and not on_cpu and step % self.every_n_steps:
            return
        warned = self._signal is not None
        if trainer.strategy.reduce_boolean_decision(warned, all=False):
            self._end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.on_train_end(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier("the checkpoint is written")
        # Where only another rank had the signal, it is on its way to this one.
        number = self._signal or signal.SIGTERM
        what = "interrupted" if number == signal.SIGINT else f"{signal.Signals(number).name} came"
        saved = f"memfree: {what}: saved step {trainer.global_step}"
        if job_id() is not None:
            self._end_job(trainer, saved, 128 + number)
        if trainer.is_global_zero:
            say(f"{saved}; the same command goes on from there", stderr=True)
        launcher = trainer.strategy.launcher
        # The first process kills itself when one that it has started fails.
        raise SystemExit(0 if launcher is not None and trainer.local_rank > 0 else 128 + number)

    def _end_job(self, trainer: pl.Trainer, saved: str, status: int) -> NoReturn:
        ignore()  # requeueing ends this job by another SIGTERM
        if trainer.is_global_zero:
            reason = requeue()
            what = "the job is requeued" if reason is None else f"not requeued: {reason}"
            say(f"{saved}; {what}", stderr=True)
        # SLURM may end a job with its first task that ends, also before it is requeued.
        trainer.strategy.barrier("the job is requeued")
        for logger in trainer.loggers:
            logger.finalize("preempted")
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through Lightning's teardown: it takes time that SLURM may not give.
        os._exit(status)


def _is_last(trainer: pl.Trainer) -> bool:
    """Whether this batch is the last of the whole training."""
    last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_batch and last_epoch)
