"""Command `memfree submit COMMAND`: the command's own options, and those of its job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memfree.cli import COMMANDS, SCRIPTS, load, parser_of
from memfree.folders.part import ALL
from memfree.free_word import as_options
from memfree.launcher import launched
from memfree.option_messages import did_you_mean, option_message, options_of
from memfree.slurm.options import SlurmOptions
from memfree.slurm.submission import Submission
from memfree.study_files import refuse_other_study
from memfree.untrusted_yaml import check_config_files, check_no_further_files

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_ONE_PROCESS = {"demo", "study", "text-study"}
OVERVIEW = """usage: memfree submit COMMAND [options of the command] [--slurm.OPTION VALUE ...]

Submit a command as a SLURM job: train, sample, or another command of memfree. Its options are
checked at once; the job runs it in this folder with this interpreter, one process a GPU.

  --slurm.nodes, --slurm.gpus_per_node, --slurm.time, ...  what the job asks for
  --slurm.array 8                                          eight jobs share sample, index or study
  --config configs/slurm/multi_node.yaml                   the same from a file
  --dry_run true                                           print the batch script only

memfree submit COMMAND --help explains all options."""


def main(arguments: Sequence[str]) -> None:
    """Submit what the words after ``memfree submit`` say, and print how to follow it.

    Raises:
        ValueError: an option is wrong, options contradict each other, or SLURM refuses the job.
        OSError: the folder of the logs cannot be written.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    launch = launched()
    if launch.several:
        raise ValueError(f"memfree submit: {launch.started}; submit once, from a single process")
    command, *rest = arguments
    known = {**SCRIPTS, **COMMANDS}
    if command not in known:
        raise ValueError(
            f"memfree submit: unknown command {command!r}{did_you_mean(command, list(known))}; "
            f"commands are {', '.join(known)}"
        )
    submission, dry_run = submission_of(command, rest)
    slurm = submission.slurm
    if dry_run:
        print(submission.script())
        print(f"# every task runs: {submission.stage.line()}")
        if submission.parts:
            print(f"# with --part {submission.parts[0]} to {submission.parts[-1]}, one a job")
        print("# with this configuration:")
        print("\n".join(f"#   {line}" for line in submission.configuration.splitlines()))
        return
    number = submission.submit()
    tasks = f"{slurm.nodes} x {slurm.tasks} tasks" if slurm.nodes * slurm.tasks > 1 else "one task"
    jobs = f"an array of {slurm.array} jobs, each of " if submission.parts else ""
    print(f"submitted job {number}: {command}, {jobs}{tasks}")
    print(f"  its state:  squeue --jobs {number}")
    print(f"  its log:    tail --retry -F {submission.log(number)}")
    print(f"  to end it:  scancel {number}")
    if submission.parts:
        print(
            f"  one again:  the same command with --part 1/{slurm.array} instead of --slurm.array"
        )


def submission_of(command: str, arguments: Sequence[str]) -> tuple[Submission, bool]:
    """What the command line of a command asks for, and whether it is only to be shown.

    Raises:
        ValueError: an option is wrong, or options contradict each other.
    """
    known = {**SCRIPTS, **COMMANDS}[command]
    function = load(known)
    given = as_options(arguments, known.positional)
    check_config_files(given)
    refuse_other_study(command, given)
    parser = parser_of(function, f"memfree submit {command}")
    parser.add_argument("--slurm", type=SlurmOptions, default=SlurmOptions())
    own_dry_run = "--dry_run" in options_of(parser)  # a study's, which here means the job's
    if not own_dry_run:
        parser.add_argument(
            "--dry_run", type=bool, default=False, help="Whether the batch script is only printed."
        )
    check_no_further_files(given, list(parser.groups or {}))
    config = _parsed(parser, given)
    # The functions' own classes check what no type says.
    slurm: SlurmOptions = parser.instantiate(config).slurm
    dry_run = config.pop("dry_run")
    if own_dry_run:
        config["dry_run"] = False
    config.pop("slurm")
    _check_array(parser, command, config, slurm)
    _set_devices(parser, config, given, command, slurm)
    own = parser_of(function, command)
    # With what is null: it need not be the default.
    return Submission(command, own.dump(config, skip_unset=False), slurm), dry_run


def _parsed(parser: ArgumentParser, arguments: list[str], **options: Any) -> Namespace:
    try:
        return parser.parse_args(arguments, **options)
    except argparse.ArgumentError as error:
        raise ValueError(option_message(str(error), parser)) from error


def _check_array(
    parser: ArgumentParser, command: str, config: Namespace, slurm: SlurmOptions
) -> None:
    """Refuse an array of what has no parts, or of a part.

    Raises:
        ValueError: names the option.
    """
    if slurm.array == 1:
        return
    option = f"--slurm.array {slurm.array}"
    if "--part" not in options_of(parser):
        raise ValueError(f"{option}: {command} has no parts; arrays are for sample, index, study")
    if config.part != ALL:
        raise ValueError(f"{option} gives each job its part: leave --part {config.part} out")
    if command == "index" and config.features == "pixels":
        raise ValueError(f"{option}: an index of pixels has no parts; give --features of a network")


def _set_devices(
    parser: ArgumentParser,
    config: Namespace,
    arguments: list[str],
    command: str,
    slurm: SlurmOptions,
) -> None:
    """Let the command use the processes of the job; what the user has given must be the same."""
    # Plain numbers: the configuration is written as YAML.
    wanted = {"devices": int(slurm.tasks), "num_nodes": int(slurm.nodes)}
    sources = {
        "devices": "--slurm.tasks_per_node" if slurm.tasks_per_node else "--slurm.gpus_per_node",
        "num_nodes": "--slurm.nodes",
    }
    has_devices = "trainer.devices" in config and command not in _ONE_PROCESS
    if not has_devices:
        for name, number in wanted.items():
            if number > 1:
                raise ValueError(
                    f"{sources[name]} {number}: {command} is one process; give "
                    + ("--slurm.tasks_per_node 1" if name == "devices" else "--slurm.nodes 1")
                )
        return
    given = _parsed(parser, arguments, defaults=False)
    for name, number in wanted.items():
        option = f"trainer.{name}"
        if option in given and str(given[option]) not in (str(number), "auto"):
            raise ValueError(
                f"--{option} {given[option]} contradicts {sources[name]} {number}: "
                f"leave --{option} out"
            )
        config[option] = number
