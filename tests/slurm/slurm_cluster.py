"""A Slurm of this machine's own: two nodes, started and stopped by the scripts beside this file."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")


def missing_programs():
    """Names of what must be installed and is not."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def free_ports():
    """First of a range of ports that nobody listens on."""
    for first in range(20000 + os.getpid() % 400 * 20, 32000, 20):
        try:
            for port in (first, first + 11, first + 12):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports")


class Cluster:
    """A running Slurm; ``stop`` ends it.

    Where root, each node is a network namespace with an address of its own, so that processes that
    meet at 127.0.0.1 do not meet.
    """

    def __init__(self):
        # munged wants a folder that all may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="memfree-slurm-"))
        self.folder.chmod(0o755)
        self.scripts = {
            **os.environ,
            "SLURM_TEST_RUN": str(self.folder / "run"),
            "SLURM_TEST_PORT": str(free_ports()),
        }
        self.mode, self.watch, self.env = None, None, dict(os.environ)

    def start(self):
        """Start it in the best mode that works here; the reason if none does."""
        modes = ["netns", "uts", "host"] if os.geteuid() == 0 else ["host"]
        if shutil.which("ip") is None:
            modes = [mode for mode in modes if mode != "netns"]
        for mode in modes:
            self.scripts["SLURM_TEST_MODE"] = mode
            # Not by pipes: the daemons would hold them open.
            with open(self.folder / "start.log", "w") as log:
                done = subprocess.run(
                    [HERE / "start.sh"],
                    env=self.scripts,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=60,
                    check=False,
                )
            if done.returncode == 0:
                self.mode = mode
                self._stop_if_killed()
                self.env["SLURM_CONF"] = str(self.folder / "run" / "slurm.conf")
                self.env["PATH"] = f"{self.folder / 'run' / 'bin'}:{os.environ['PATH']}"
                return None
        return " ".join((self.folder / "start.log").read_text().split()[-60:])

    def _stop_if_killed(self):
        """Stop it also when this process is killed, and can stop nothing itself."""
        script = 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; "$2"; rm -rf "$3"'
        words = ["sh", "-c", script, "sh", str(os.getpid()), str(HERE / "stop.sh"), self.folder]
        self.watch = subprocess.Popen(
            words,
            env=self.scripts,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self):
        """End all jobs and daemons."""
        if self.watch is not None:
            self.watch.kill()
            self.watch.wait()
        subprocess.run(
            [HERE / "stop.sh"],
            env=self.scripts,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command, **options):
        """Run a command with this Slurm, as text."""
        words = [str(word) for word in command]
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, check=False, **options
        )

    def sbatch(self, *words, **options):
        """Submit by sbatch; the number of the job."""
        done = self.run("sbatch", "--parsable", *words, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job):
        """State of a job as squeue names it, and how often it was started again."""
        done = self.run("scontrol", "show", "job", job)
        state = re.search(r"JobState=(\w+)", done.stdout)
        restarts = re.search(r"Restarts=(\d+)", done.stdout)
        return (state[1] if state else "", int(restarts[1]) if restarts else 0)

    def wait(self, job, done, seconds=420):
        """Wait until ``done(state, restarts)``; both."""
        end = time.monotonic() + seconds
        while not done(*self.state(job)):
            assert time.monotonic() < end, f"job {job} is still {self.state(job)}"
            time.sleep(0.1)
        return self.state(job)

    def wait_to_end(self, job, seconds=420):
        """Wait for the end of a job; its state and how often it was started again."""
        active = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")
        active += ("SIGNALING",)  # while a warning is on its way
        return self.wait(job, lambda state, _: state not in active, seconds)

    def template(self, name, folder, log, **changes):
        """A batch script of configs/slurm without GPUs and with other values of its options."""
        lines = (HERE.parents[1] / "configs" / "slurm" / name).read_text().splitlines()
        changes = {"output": log, **changes}
        kept = []
        for line in lines:
            option = re.match(r"#SBATCH --([\w-]+)", line)
            if option and option[1] in ("gpus-per-node", "cpus-per-task", "mem"):
                continue
            if option and option[1].replace("-", "_") in changes:
                line = f"#SBATCH --{option[1]}={changes[option[1].replace('-', '_')]}"
            kept.append(line.replace("=$SLURM_CPUS_PER_TASK", "=1"))
        path = folder / name
        path.write_text("\n".join(kept) + "\n")
        return path


def words(command):
    """A command as one line for a shell."""
    return shlex.join(str(word) for word in command)
