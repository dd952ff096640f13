"""What a console and a line of output show of untrusted text."""

import ast
import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from memfree.cli.errors import exit_with_error
from memfree.console import plain_console, say, shown

SOURCE = Path(__file__).parents[2] / "src" / "memfree"
CASES = {
    "plain words.png": "plain words.png",
    "\x1b[31mred": r"\x1b[31mred",
    "a\r\nb\tc": r"a\r\nb\tc",
    "\x9b2J": r"\x9b2J",
    "\u202eabc\u2066": r"\u202eabc\u2066",
    "a\u2028b\u2029": r"a\u2028b\u2029",
    "\udcff\ud800": r"\xff\ud800",
    "\u202f\u00a0\u200d\u00e9\U0001f600": "\u202f\u00a0\u200d\u00e9\U0001f600",
    "\0\x7f": r"\x00\x7f",
}


@pytest.mark.parametrize("text", CASES)
def test_untrusted_text(text, capsys):
    assert shown(text) == CASES[text]
    say(text)
    assert capsys.readouterr().out == CASES[text] + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "no such encoding"])
def test_streams_of_other_encodings(encoding):
    assert shown("σ = 1", encoding) == r"\u03c3 = 1"


def printed(what, encoding="utf-8", **options):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    plain_console(file=stream, width=60).print(what, **options)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_console_shows_names_as_text(encoding):
    table = Table("name", "σ", title="\x1b[2Jtitle")
    table.add_row("\x1b[31m[bold]:cat:\U0001f600.png", "1")
    table.add_row(Text("\x1b]0;x\x07"), "2")
    for what in (table, "\x1b[31m[bold]:cat:", Text("\x1b[31m[bold]:cat:")):
        text = printed(what, encoding)
        assert "\x1b" not in text and "\x07" not in text
        assert "[bold]:cat:" in text
    assert printed("one\ntwo", encoding) == "one\ntwo\n"


def test_cells_are_as_wide_as_what_is_shown():
    table = Table("name", "next")
    table.add_row("\x1b[31m\x1b[32m", "x")
    lines = printed(table).splitlines()
    assert r"\x1b[31m\x1b[32m" in lines[3] and len({len(line) for line in lines}) == 1


def test_an_error_is_one_line_of_text(capsys):
    with pytest.raises(SystemExit):
        exit_with_error("a\u202fb:  \x1b[2J\nbad\r\n\tworse \udcff")
    said = capsys.readouterr().err
    assert said == "memfree: error: a\u202fb: " + r"\x1b[2J bad worse \xff" + "\n"


def test_commands_print_by_this_module_alone():
    """Other files make no console of their own, and print no line that a name may be in."""
    own = {"console.py", "entry.py", "requeue.py", "errors.py", "submit.py"}
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", None)
            if path.name not in own and isinstance(node, ast.Call) and name in ("print", "Console"):
                found.append(f"{path.name}:{node.lineno}")
    assert [place.split(":")[0] for place in found] == ["report.py"], found  # __str__ of a guard's
