"""Option files that bomb, never end, or never begin: one line that names --config."""

import os

import pytest
from hostile_guard import bounded, one_line, refused

from memfree.cli import entry
from memfree.cli.entry import command_of
from memfree.folders.untrusted import check_yaml


def levels(count, text="x"):
    """A list of ten lists of ten lists …: ``count`` lines, 10 to the power of them values."""
    lines = [f"l0: &l0 [{', '.join([text] * 10)}]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, count)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "lists": levels(9),
    "one long text": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 100)}]\n",
    "objects": "\n".join(
        ["a0: &a0 {k: v}"]
        + [
            f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}"
            for i in range(1, 9)
        ]
    ),
    "merged keys": "\n".join(
        ["a0: &a0 {k: v, l: w}"]
        + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]" for i in range(1, 8)]
        + ["b: {<<: *a0, c: *a7}"]
    ),
    "itself": "a: &a [*a]\n",
    "itself in an object": "a: &a {b: *a}\n",
    "names": f"? &a {'x' * 2000}\n: 1\nb: [{', '.join(['*a'] * 2000)}]\n",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("command", ["sample", "prepare", "evaluate"])
def test_aliases_without_measure(tmp_path, capsys, name, command):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    with bounded(), pytest.raises(SystemExit) as exit_:
        entry.run_command(command, ["--config", str(path)])
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "--config" in said[0]


@pytest.mark.parametrize("name", BOMBS)
def test_studies_of_aliases(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    with bounded():
        command_of("study", ["--config", str(path)])  # the parser refuses it


def test_ordinary_aliases_are_read(tmp_path, capsys):
    check_yaml("a: &a [1, 2]\nb: *a\n")
    path = tmp_path / "options.yaml"
    path.write_text(f"dataset: &folder {tmp_path}/none\nindex: *folder\nout: {tmp_path}/out\n")
    with pytest.raises(SystemExit):
        entry.run_command("evaluate", ["--config", str(path), f"--samples.a={tmp_path}/s"])
    assert f"no dataset folder at {tmp_path}/none" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "study", "text-study", "prepare", "train"])
@pytest.mark.parametrize("kind", ["fifo", "device", "endless"])
def test_config_files_without_end(tmp_path, capsys, command, kind):
    path = tmp_path / "options.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with bounded(), pytest.raises(SystemExit) as exit_:
        entry.run_command(command, [f"--config={path}"])
    assert exit_.value.code == 2 and f"--config {path}" in capsys.readouterr().err


TWICE = ["seed: 1\nseed: 2\n", "plan: {images: 1, images: 2}\n", "seed: 1\n'seed': 2\n"]
FURTHER = ["config: {}\n", "config: [{}]\n", "plan: {}\n", "plan: {}\nparts: null\n"]


@pytest.mark.parametrize("text", TWICE)
def test_an_option_that_is_given_twice(tmp_path, capsys, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        entry.run_command("prepare", [f"--config={path}", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "--config" in said and "twice" in said
    check_yaml("a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: {a: 1}\ne: 'x: y'\n")


@pytest.mark.parametrize("text", FURTHER)
@pytest.mark.parametrize("kind", ["text", "fifo"])
def test_option_files_name_no_further_files(tmp_path, capsys, text, kind):
    path, secret = tmp_path / "options.yaml", tmp_path / "secret"
    secret.write_text("password") if kind == "text" else os.mkfifo(secret)
    path.write_text(text.format(secret))
    with bounded(), pytest.raises(SystemExit) as exit_:
        entry.run_command("prepare", [f"--config={path}", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and f"--config {path}" in said and "password" not in said
    with bounded(), pytest.raises(SystemExit):
        entry.run_command("prepare", [f"--plan={secret}", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert "--plan" in said and "password" not in said and not (tmp_path / "out").exists()


def test_a_number_of_thousands_of_digits(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text(f"seed: {'9' * 5000}")
    with pytest.raises(SystemExit) as exit_:
        entry.run_command("prepare", [f"--config={path}", f"--out={tmp_path / 'out'}"])
    assert exit_.value.code == 2 and "--config" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_an_option_file_in_another_encoding_is_named(tmp_path, capsys, encoding):
    path = tmp_path / "options.yaml"
    path.write_bytes("licence: café".encode(encoding))
    with pytest.raises(SystemExit) as exit_:
        entry.run_command("prepare", [f"--config={path}", f"--out={tmp_path / 'out'}"])
    assert exit_.value.code == 2
    assert f"--config {path} is not UTF-8" in capsys.readouterr().err


def test_an_option_file_from_a_shell(tmp_path):
    from memfree.folders.untrusted import check_config_files

    reader, writer = os.pipe()
    check_config_files(["--config", f"/dev/fd/{reader}"])
    os.close(writer), os.close(reader)
    os.mkfifo(tmp_path / "x")
    one = refused(lambda: check_config_files(["--config", str(tmp_path / "x")]), tmp_path / "x")
    assert one_line(ValueError(one))
