"""Every ``--help`` and every wrong option is answered before anything heavy is imported."""

import resource
import subprocess
import sys
from dataclasses import asdict
from typing import get_type_hints

import pytest

from memfree.cli.entry import COMMANDS
from memfree.commands.index import EmbeddingDevices
from memfree.commands.sample import SamplingDevices
from memfree.commands.train import TrainerOptions
from memfree.models.options import Devices

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


@pytest.mark.parametrize("options", [TrainerOptions, SamplingDevices, EmbeddingDevices])
def test_devices_are_the_same_options_everywhere(options):
    """Those of train stand among its others, and an index is embedded on one device by default."""
    hints, wanted = get_type_hints(options), get_type_hints(Devices)
    assert {name: hints[name] for name in wanted} == wanted
    given = asdict(options())
    if options is EmbeddingDevices:
        assert given["devices"] == 1
        given["devices"] = "auto"
    assert {name: given[name] for name in wanted} == asdict(Devices())
