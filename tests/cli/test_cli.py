"""Options, YAML layers, saved configurations and one-line errors of the command line."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from memfree.cli import entry
from memfree.commands.study import study, text_study
from memfree.folders.manifest import save_config
from memfree.slurm.launcher import is_first_process

ROOT = Path(__file__).parents[2]


@dataclass
class Shape:
    """Size of something."""

    widths: list[int] = field(default_factory=lambda: [1, 2])
    """Widths, finest first."""
    kind: Literal["round", "square"] = "round"
    """Which kind."""


@dataclass
class Numbers:
    """Reads numbers."""

    path: Path
    """the folder to read."""
    batch_size: int = 4
    """how many at once."""

    def __post_init__(self):
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"no numbers at {self.path}")


def work(
    data: Numbers,
    out: Path,
    shape: Shape,
    rate: float = 0.5,
    fail: str = "",
    picks: list[int] | int | None = None,
) -> tuple[Numbers, Path, Shape, float]:
    """Do some work.

    More about it.

    Args:
        data: what to read.
        out: where to write.
        shape: its shape.
        rate: how fast.
        fail: how to fail.
        picks: one or several.

    Raises:
        ValueError: always, if told so.
    """
    errors = {
        "value": ValueError("two\nlines"),
        "os": FileNotFoundError(2, "No such file or directory", "x.png"),
        "interrupt": KeyboardInterrupt(),
        "bug": RuntimeError("a bug"),
        "lightning": MisconfigurationException("No `x`. See https://lightning.ai/x.\nAnd so on."),
    }
    if fail == "exit":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does
    if fail:
        raise errors[fail]
    if not out.exists():
        out.mkdir()
        save_config(out)
    return data, out, shape, rate


def line(capsys, *args):
    """The only line of a run that fails with status 2."""
    with pytest.raises(SystemExit) as exit_:
        entry.run(work, list(args))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memfree: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def good(tmp_path):
    return [f"--data.path={tmp_path}", f"--out={tmp_path / 'out'}"]


def test_options_reach_the_function_typed(good, tmp_path):
    data, out, shape, rate = entry.run(
        work, [*good, "--data.batch_size=8", "--shape.widths=[3, 4]", "--rate=1e-3"]
    )
    assert (data.batch_size, out, shape, rate) == (8, tmp_path / "out", Shape([3, 4]), 1e-3)


def test_later_files_and_options_win(good, tmp_path):
    (tmp_path / "a.yaml").write_text("rate: 1e-4\nshape: {kind: square, widths: [7]}\n")
    (tmp_path / "b.yaml").write_text("shape: {widths: [9]}\n")
    files = [f"--config={tmp_path / name}.yaml" for name in "ab"]
    assert entry.run(work, [*files, *good])[2:] == (Shape([9], "square"), 1e-4)
    assert entry.run(work, [*files, *good, "--rate=2"])[3] == 2
    assert entry.run(work, ["--rate=2", *files, *good])[3] == 1e-4


def test_saved_configuration_replays(good, tmp_path):
    first = entry.run(work, [*good, "--rate=0.25", "--shape.kind=square"])
    again = entry.run(work, [f"--config={tmp_path / 'out' / 'config.yaml'}"])
    assert again[1:] == first[1:]
    assert again[0].batch_size == first[0].batch_size


def test_a_command_that_makes_nothing_keeps_the_configuration_of_what_is_there(good, tmp_path):
    entry.run(work, good)
    before = (tmp_path / "out" / "config.yaml").read_text()
    entry.run(work, [*good, "--rate=0.25"])
    assert (tmp_path / "out" / "config.yaml").read_text() == before


def test_a_failed_run_leaves_no_configuration(good, tmp_path, capsys):
    line(capsys, *good, "--fail=value")
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        entry.run(work, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Do some work. More about it." in text
    assert "Args:" not in text
    assert "--data.path PATH the folder to read. (required" in text
    assert "--data.batch_size BATCH_SIZE how many at once. (type: int, default: 4)" in text
    assert "Widths, finest first. (type: list[int], default: [1, 2])" in text
    assert "--shape.kind {round,square} Which kind." in text
    assert "--rate RATE how fast. (type: float, default: 0.5)" in text


def test_print_config_is_complete_yaml(good, capsys):
    with pytest.raises(SystemExit) as exit_:
        entry.run(work, [*good, "--print_config"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "batch_size: 4" in out
    assert "rate: 0.5" in out
    assert "\nconfig" not in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shape.kinds=round", "unknown option --shape.kinds, did you mean --shape.kind?"),
        ("--rat=1", "unknown option --rat, did you mean --rate?"),
        ("--rate=fast", "--rate: expected float, got fast"),
        ("--shape.kind=oval", "--shape.kind: expected one of round, square, got oval"),
        ("--config=nowhere.yaml", "--config: File does not exist"),
        ("--picks=x", "--picks: "),
        ("--picks=x", "--picks: expected one of list[int], int, null, got x; see --help"),
        ("--fail=value", "two lines"),
        ("--fail=lightning", "memfree: error: No x.\n"),
        ("--fail=os", "x.png: No such file or directory"),
        ("--data.path=nowhere", "no numbers at nowhere"),
    ],
)
def test_errors_are_one_line(good, capsys, option, message):
    assert message in line(capsys, *good, option)


def test_missing_options_are_named(capsys, tmp_path):
    assert "missing option --data.path" in line(capsys, "--out=x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shape: {widhts: [1]}\n", "unknown option --shape.widhts, did you mean --shape.widths?"),
        ("shape: {widths: [1}\n", "Problems parsing config"),
    ],
)
def test_wrong_yaml_is_one_line(good, capsys, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in line(capsys, f"--config={tmp_path / 'bad.yaml'}", *good)


@pytest.mark.parametrize("kind", ["interrupt", "exit"])
def test_interrupt_exits_with_130(good, capsys, kind):
    with pytest.raises(SystemExit) as exit_:
        entry.run(work, [*good, f"--fail={kind}"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "memfree: interrupted\n"


@pytest.mark.parametrize("status", [0, 1])
def test_other_exits_pass(status):
    def leave() -> None:
        raise SystemExit(status)

    with pytest.raises(SystemExit) as exit_:
        entry.run(leave, [])
    assert exit_.value.code == status


@pytest.mark.parametrize(
    "script, words",
    [
        ("train.py", ["--data.path", "nowhere", "--out", "nowhere/out"]),
        ("sample.py", ["--model", "nowhere", "--out", "nowhere/out"]),
    ],
)
@pytest.mark.parametrize("module", ["jsonargparse", "torch", "lightning.fabric"])
def test_interrupt_during_the_imports_is_one_line(script, words, module):
    """Even where the library that is imported catches every exception."""
    code = f"""
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *rest):
        try:
            if name == {module!r}:
                os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            pass
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv = {[script, *words]!r}
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "memfree: interrupted\n")


def test_bugs_keep_their_traceback(good):
    with pytest.raises(RuntimeError, match="a bug"):
        entry.run(work, [*good, "--fail=bug"])


def test_debug_variable_shows_the_traceback(good, capsys, monkeypatch):
    monkeypatch.setenv("MEMFREE_DEBUG", "1")
    with pytest.raises(SystemExit):
        entry.run(work, [*good, "--fail=value"])
    assert "Traceback" in capsys.readouterr().err


def test_python_calls_save_no_configuration(tmp_path):
    save_config(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_first_process(monkeypatch, variables, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_main_lists_its_commands_without_heavy_imports(capsys):
    entry.main([])
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in (*entry.COMMANDS, "train.py", "sample.py"))
    code = (
        "import sys; from memfree.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["train", "sample"])
def test_a_script_of_a_checkout_is_a_command(name, capsys):
    """The wheel has no scripts, so the same options are those of a verb."""
    with pytest.raises(SystemExit) as exit_:
        entry.main([name, "--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: memfree {name} ")
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"usage: {name}.py ")
    options = [{word for word in text.split() if word[:2] == "--"} for text in (told, done.stdout)]
    assert options[0] == options[1]


def test_main_names_a_near_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        entry.main(["evalute"])
    assert exit_.value.code == 2
    assert "unknown command 'evalute', did you mean evaluate?" in capsys.readouterr().err


def test_main_runs_the_function_of_a_command(monkeypatch, good):
    command = entry.Command(f"{__name__}:work", "work")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[work.__module__])
    monkeypatch.setitem(entry.COMMANDS, "work", command)
    assert entry.main(["work", *good, "--rate=3"])[3] == 3


def test_output_into_a_closed_pipe_is_no_error():
    lines = ("from memfree.cli.entry import run", "def talk() -> None:", " print('x' * 10**6)")
    code = "\n".join([*lines, "run(talk, [])"])
    shell = f'"{sys.executable}" -c "$CODE" | head -c 1 >/dev/null'
    environment = {**os.environ, "CODE": code}
    done = subprocess.run(
        ["sh", "-c", shell], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["study", "text-study"])
@pytest.mark.parametrize(("file", "own"), [("oracle", "grids:"), ("emoji_baselines", "counts:")])
def test_study_runs_plans_of_both_kinds(verb, file, own, capsys):
    path = str(ROOT / "configs" / "study" / f"{file}.yaml")
    for words in ([path], ["--name=x", path], ["--config", path]):
        with pytest.raises(SystemExit) as exit_:
            entry.main([verb, "--print_config=", *words])
        assert exit_.value.code == 0
        said = capsys.readouterr()
        assert own in said.out
        assert said.err.count("\n") == ("memfree study PLAN.yaml" in said.err) == (verb != "study")


def test_a_plan_may_stand_on_the_line(capsys):
    for words, own in (
        (["--grids=[{factor: [2]}]"], "grids:"),
        (["--subjects={}", "--training.seed=3"], "counts:"),
        (["--subjects={}", "--noise_seed", "3"], "counts:"),
    ):
        with pytest.raises(SystemExit):
            entry.main(["study", "--name=x", *words, "--print_config"])
        assert own in capsys.readouterr().out


def test_an_option_wins_over_a_file_before_or_behind_it(capsys):
    file = str(ROOT / "configs" / "study" / "emoji_baselines.yaml")
    for words in ([file, "--noise_seed=7"], ["--noise_seed=7", file]):
        with pytest.raises(SystemExit):
            entry.main(["study", *words[:1], "--print_config=", *words[1:]])
        assert "noise_seed: 7" in capsys.readouterr().out


def test_the_font_of_emoji_is_a_path(capsys):
    with pytest.raises(SystemExit):
        entry.main(["prepare", "--out=x", "--source=emoji", "--font=y"])
    said = capsys.readouterr().err
    assert "unknown option --font: give it as --path FONT, with --source emoji; see" in said


def test_a_value_may_have_the_name_of_a_group(tmp_path, monkeypatch):
    """``--data.path data --rate 1`` is no file in place of the group ``data``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    data, *_ = entry.run(work, ["--data.path", "data", "--out", "shape", "--rate", "1"])
    assert data.path == Path("data")


def test_text_plans_are_told_by_options_that_grids_do_not_have():
    grid, text = (inspect.signature(plan).parameters for plan in (study, text_study))
    assert {*text} - {*grid} >= entry.TEXT_PLAN
