"""What the user can mend ends a command in one line and an exit status."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from memfree.console import say
from memfree.launcher import check_variables
from memfree.requeue import requeued_when_warned

DEBUG_VARIABLE = "MEMFREE_DEBUG"
INTERRUPTED = "memfree: interrupted"


def guarded(call: Callable[[], Any], goes_on: bool = True) -> Any:
    """Turn what the user can mend into one line and an exit status.

    Args:
        call: what to do.
        goes_on: whether what it had done is kept when it is stopped and started again.
    """
    try:
        check_variables()  # importing Lightning reads them
        with requeued_when_warned(goes_on):
            return call()
    except BrokenPipeError:
        # The reader of our output has gone (``| head``); the interpreter must not flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _mendable() as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        exit_with_error(message_of(error))
    except KeyboardInterrupt:
        _exit_interrupted()
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit with status 1.
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
            _exit_interrupted()
        raise


def _mendable() -> tuple[type[Exception], ...]:
    """What is raised for the user to mend; of heavy modules only if they are imported at all."""
    heavy = {
        "memfree.memory": "ExplainedOutOfMemoryError",
        "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    }
    # An import may have been interrupted.
    found = [getattr(sys.modules.get(module), name, None) for module, name in heavy.items()]
    return (ValueError, OSError, *(error for error in found if error is not None))


def message_of(error: Exception) -> str:
    """What an error says, without Python's ``[Errno 2]`` and Lightning's addresses."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return str(error)
    from memfree.trainers import first_line

    return first_line(error)


def _exit_interrupted() -> NoReturn:
    print(INTERRUPTED, file=sys.stderr)
    raise SystemExit(130) from None


def exit_with_error(message: str) -> NoReturn:
    """End the process with status 2 and ``message`` as the one line of it."""
    line = re.sub(" {2,}", " ", " ".join(message.splitlines()).replace("\t", " ")).strip()
    say(f"memfree: error: {line}", stderr=True)
    raise SystemExit(2)
