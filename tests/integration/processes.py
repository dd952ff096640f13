"""Commands as processes of their own."""

import signal
import subprocess


def start(command, **streams):
    """Start a command that an interrupt reaches, as text.

    A shell's background job ignores interrupts, and so would what it starts.
    """
    return subprocess.Popen(
        command,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )
