"""Commands killed by SIGKILL at every change of the file system, and started again."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from kill_commands import PREPARE, make_inputs, words
from kill_compare import contents, difference
from kill_server import KillServer

COMMANDS = {
    "prepare": 10,
    "train": 14,
    "index_pixels": 7,
    "index_network": 10,
    "sample": 12,
    "evaluate": 6,
}
"""Points of each command that the quick test kills at."""
RANDOM_KILLS = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = KillServer(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def inputs(server, tmp_path_factory):
    return make_inputs(server, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(server, inputs, tmp_path_factory):
    """By command: how it ended, what it left, and the changes that it made."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(f"whole-{name}")
            ended = server.run(words(inputs)[name], folder)
            assert ended.status == 0, ended.output
            made[name] = ended, contents(folder)
        return made[name]

    return run


def points(events, limit):
    """Numbers of changes, and how to kill there: one of a kind, spread over the run.

    Behind what promises that something is on the disk: what follows may rely on it. Before a rename
    is behind the flush of its file.
    """
    kinds = {}
    for number, (kind, path) in enumerate(events):
        kinds.setdefault((kind, re.sub(r"[0-9a-f]*\d+", "N", path)), number)
    numbers = sorted(kinds.values())
    chosen = {numbers[round(i * (len(numbers) - 1) / (limit - 1))] for i in range(limit)}
    hows = {"fsync": ("torn", "after"), "rename": ("after",), "replace": ("after",)}
    return [(n, how) for n in sorted(chosen) for how in hows.get(events[n][0], ("before",))]


def every_point(events):
    """All changes, before and after each, and with half of a file that was being flushed."""
    hows = {"fsync": ("before", "torn", "after")}
    return [
        (number, how)
        for number, (kind, _) in enumerate(events)
        for how in hows.get(kind, ("before", "after"))
    ]


def check_what_is_there(folder, expected):
    """No file has its final name before it is whole, and a manifest comes last."""
    # Reads checkpoints and JSON to their end.
    there = contents(folder, hidden=False)
    visible = {name: value for name, value in there.items() if value != "empty folder"}
    for name, value in visible.items():
        if name.endswith(".csv"):
            with open(folder / name, newline="") as file:
                assert all(
                    None not in row and None not in row.values() for row in csv.DictReader(file)
                )
        elif not name.endswith(".ckpt"):
            assert difference({name: expected.get(name)}, {name: value}) is None
    if "out/manifest.json" in visible:
        whole = {name: value for name, value in expected.items() if name.startswith("out/")}
        assert difference(whole, {**visible}) is None


def kill_and_repeat(server, command, whole, folder, chosen):
    """Kill at each point in a folder of its own, repeat the command, compare."""
    ended, expected = whole
    for number, how in chosen:
        where = f"killed {how} change {number}: {ended.events[number]}"
        here = folder / f"{number}-{how}"
        assert server.run(command, here, number, how).status == -signal.SIGKILL, where
        check_what_is_there(here, expected)
        again = server.run(command, here)
        assert again.status == ended.status, f"{where}: {again.output}"
        assert difference(expected, contents(here)) is None, where
        shutil.rmtree(here)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_named_points(server, inputs, undisturbed, tmp_path, name):
    whole = undisturbed(name)
    chosen = points(whole[0].events, COMMANDS[name])
    kill_and_repeat(server, words(inputs)[name], whole, tmp_path, chosen)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_point(server, inputs, undisturbed, tmp_path, name):
    whole = undisturbed(name)
    chosen = every_point(whole[0].events)
    print(f"{name}: {len(whole[0].events)} changes, {len(chosen)} points")
    kill_and_repeat(server, words(inputs)[name], whole, tmp_path, chosen)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments(server, inputs, undisturbed, tmp_path, name):
    """Each time up to three kills, one after another, before the run is let through."""
    ended, expected = undisturbed(name)
    moments = random.Random(name)
    kills = 0
    while kills < RANDOM_KILLS:
        here = tmp_path / str(kills)
        for _ in range(moments.randint(1, 3)):
            process = server.begin(words(inputs)[name], here)
            time.sleep(moments.uniform(0, ended.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            kills += server.wait().status == -signal.SIGKILL
            check_what_is_there(here, expected)
        again = server.run(words(inputs)[name], here)
        assert again.status == ended.status, again.output
        assert difference(expected, contents(here)) is None
        shutil.rmtree(here)


REPLACING = {
    "prepare": ["prepare", "--out=out", *PREPARE, "--seed=1", "--overwrite=true"],
    "train": ["--trainer.max_steps=7"],
    "index_pixels": ["--overwrite=true"],
}
"""What is run over the result of ``words``: another data set, a longer training, the same index."""


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACING)
def test_an_earlier_result_is_never_lost(server, inputs, undisturbed, tmp_path, name):
    """Killed before and after each rename of a run that replaces a finished folder."""
    _, old = undisturbed(name)
    first = words(inputs)[name]
    command = REPLACING[name] if name == "prepare" else [*first, *REPLACING[name]]
    assert server.run(first, tmp_path / "first").status == 0

    def start(folder):
        shutil.copytree(tmp_path / "first", folder)
        return folder

    ended = server.run(command, start(tmp_path / "whole"))
    assert ended.status == 0, ended.output
    new = contents(tmp_path / "whole")
    renames = [n for n, (kind, path) in enumerate(ended.events) if kind in ("rename", "replace")]
    folders = [n for n in renames if (tmp_path / "whole" / ended.events[n][1]).is_dir()]
    folders = [folders[0] - 1, *folders]  # the first moves the old one aside
    for number in folders:
        for how in ("before", "after"):
            here = start(tmp_path / f"{number}-{how}")
            assert server.run(command, here, number, how).status == -signal.SIGKILL
            assert is_somewhere(here, [old, new], "out/" if name != "train" else "out/diffusers/")
            again = server.run(command, here)
            assert again.status == 0, again.output
            assert difference(new, contents(here)) is None


def is_somewhere(folder, results, part):
    """Whether one of the results is whole, in its place or moved aside beside it."""
    place = folder / part.rstrip("/")
    wanted = [
        {name[len(part) :]: value for name, value in result.items() if name.startswith(part)}
        for result in results
    ]
    there = [place, *place.parent.glob(f".{place.name}.*")]
    return any(contents(path) in wanted for path in there if path.is_dir())


def test_a_kill_point_is_where_it_says(server, tmp_path):
    """The instrument itself: killed before the first rename, there is no file of that name."""
    ended = server.run(["prepare", "--out=out", *PREPARE], tmp_path / "whole")
    renamed = next(n for n, (kind, _) in enumerate(ended.events) if kind == "replace")
    path = ended.events[renamed][1]
    for how in ("before", "after"):
        here = tmp_path / how
        assert server.run(["prepare", "--out=out", *PREPARE], here, renamed, how).status == -9
        there = [one for one in here.rglob(Path(path).name) if one.is_file()]
        assert bool(there) == (how == "after")
    kinds = {kind for kind, _ in ended.events}
    assert {"open", "fsync", "rename", "replace", "mkdir"} <= kinds
    assert json.dumps(ended.events)
