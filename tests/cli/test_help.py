"""Every ``--help`` and every wrong option is answered before anything heavy is imported."""

import resource
import subprocess
import sys

import pytest

from memfree.cli.entry import COMMANDS

HEAVY = ("torch", "lightning", "diffusers", "transformers", "faiss", "sklearn", "scipy", "pyarrow")
PROGRAM = f"""
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise AssertionError("imported " + name)


sys.meta_path.insert(0, Refuse())
from memfree.cli.entry import main

main(sys.argv[1:])
"""


def light(*words):
    """Run a command in a process that fails at any heavy import."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    ended = light(command, "--help")
    assert ended.returncode == 0, ended.stderr
    assert "--config" in ended.stdout
    wrong = light(command, "--no_such_option", "1")
    assert wrong.returncode == 2 and "--no_such_option" in wrong.stderr, wrong.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "index"])
def test_help_of_a_submitted_command_imports_nothing_heavy(command):
    ended = light("submit", command, "--help")
    assert ended.returncode == 0 and "--slurm.time" in ended.stdout, ended.stderr


def test_help_takes_less_than_a_second_of_cpu():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", "from memfree.cli.entry import main; main()", "evaluate", "--help"],
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
