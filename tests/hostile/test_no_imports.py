"""Options and configurations import no module that they name, not even to refuse it."""

import sys

import pytest
import yaml

from memfree.cli import entry

MODULE = "import pathlib\n\npathlib.Path('canary').write_text('run')\n\n\nclass Net:\n    pass\n"
NAMED = {
    "a name": "evil.Net",
    "class_path": {"class_path": "evil.Net"},
    "with init_args": {"class_path": "evil.Net", "init_args": {"a": 1}},
    "nested": {"path": {"class_path": "evil.Net"}},
    "a list": [{"class_path": "evil.Net"}],
}
"""What a configuration may say to have a module imported."""


class Recorder:
    """A finder that only notes the names of modules that are looked for."""

    def __init__(self):
        self.names = []

    def find_spec(self, name, path=None, target=None):
        """Note the name and find nothing."""
        self.names.append(name)


@pytest.fixture
def imports(tmp_path, monkeypatch):
    """Names of modules that were looked for; ``evil.py`` lies where it would be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    recorder = Recorder()
    monkeypatch.setattr(sys, "meta_path", [recorder, *sys.meta_path])
    return recorder.names


def refused_line(capsys, command, words):
    """The one line with which a command refuses its words."""
    with pytest.raises(SystemExit) as exit_:
        entry.run_command(command, words)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("how", NAMED)
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("prepare", "parts"),
        ("prepare", "plan"),
        ("train", "data"),
        ("train", "model"),
        ("train", "model.network"),
        ("train", "trainer"),
        ("train", "trainer.logger"),
        ("sample", "guidance"),
        ("index", "extractor"),
        ("study", "options"),
        ("study", "models"),
    ],
)
def test_a_class_in_a_configuration_is_not_imported(
    tmp_path, imports, capsys, command, option, how
):
    value = NAMED[how]
    for part in reversed(option.split(".")):
        value = {part: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"out": "out", **value}))
    line = refused_line(capsys, command, ["--config=config.yaml"])
    assert "import_path_allowlist" not in line
    assert "evil" not in imports
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "evil.py"]


@pytest.mark.parametrize(
    "words",
    [
        ["--data=evil.Net"],
        ["--data.class_path=evil.Net"],
        ['--data={"class_path": "evil.Net"}'],
        ["--data.help=evil.Net"],
        ["--data=one.yaml"],
        ["--config={data: {class_path: evil.Net}}"],
        ["--config=inner.yaml", "--print_config"],
        ["--config=outer.yaml"],
        ["--data=memfree.cli.entry.os"],
    ],
)
def test_nor_one_on_the_command_line_or_in_a_further_file(tmp_path, imports, capsys, words):
    (tmp_path / "one.yaml").write_text("class_path: evil.Net\n")
    (tmp_path / "inner.yaml").write_text("data: {class_path: evil.Net}\n")
    (tmp_path / "outer.yaml").write_text("config: inner.yaml\n")
    line = refused_line(capsys, "train", ["--out=out", *words])
    assert "import_path_allowlist" not in line
    assert "evil" not in imports and not (tmp_path / "canary").exists()
