"""What the documentation names exists: files, functions, links; README.md stays short."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from memfree.cli import entry
from memfree.commands import submit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "memfree"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PARTS = {path.stem for path in SOURCE.iterdir()}
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"((?:[\w.-]+/)*[\w-]+\.py)(?::{1,2}([\w.]+))?")
DOTTED = re.compile(r"(?:memfree\.)?([a-z]\w*(?:\.\w+)+)\b")
RUN = re.compile(r"\bpython (\S+\.py)\b")
THEIRS = {
    "sd_mitigation.py",
    "inference_mem.py",
    "generate_test_dataset_stp.py",
    "generate_test_dataset_dtp.py",
    "generate_test_dataset_opposite_guidance.py",
}
"""Programs of the baselines' authors."""
LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_id(path):
    return str(path.relative_to(ROOT))


def names_of(body):
    """By name, what a module or class defines."""
    names = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return names


def has(path, dotted):
    """Whether a file defines ``function``, ``Class`` or ``Class.method``."""
    body = ast.parse(path.read_text()).body
    for name in dotted.split("."):
        node = names_of(body).get(name)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def public_names(package):
    """What a package exports from its files."""
    stub, own = package / "__init__.pyi", package / "__init__.py"
    return set(re.findall(r"import (\w+) as", (stub if stub.is_file() else own).read_text()))


def resolves(dotted):
    """Whether ``part.module.name`` is there, with or without its end."""
    place, names = SOURCE, dotted.split(".")
    while names:
        name = names.pop(0)
        if (place / name).is_dir():
            place = place / name
        elif (place / f"{name}.py").is_file():
            return not names or has(place / f"{name}.py", ".".join(names))
        else:
            return name in public_names(place)
    return True


def place_of(name):
    """A file that a page names: below the repository, the package, or a script's folder."""
    places = (ROOT, SOURCE, ROOT / "docs", ROOT / "tests" / "hostile")
    return next((place / name for place in places if (place / name).is_file()), None)


def code_of(page):
    """All that stands as code within the text of a page; blocks are not."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return CODE.findall(text)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_functions_exist(page):
    wrong = [name for name in RUN.findall(page.read_text()) if place_of(name) is None]
    for code in code_of(page):
        if code in THEIRS:
            continue
        if found := FILE.match(code):
            path = place_of(found[1])
            if path is None or (found[2] and not has(path, found[2])):
                wrong.append(code)
        elif (found := DOTTED.match(code)) and found[1].split(".")[0] in PARTS | {"memfree"}:
            wrong += [] if resolves(found[1].removeprefix("memfree.")) else [code]
    assert not wrong, wrong


def test_the_architecture_names_functions():
    named = [
        found[2] for code in code_of(ROOT / "docs/architecture.md") if (found := FILE.match(code))
    ]
    assert sum(name is not None for name in named) > 50


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    wrong = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, wrong


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_of_the_documentation_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    pages = {page_id(page) for page in PAGES} - {"README.md"}
    assert pages <= linked, pages - linked


def commands_of(page):
    """Commands in the indented blocks of a page, as lists of words."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(
        r"^    (memfree .*|python (?:train|sample)\.py .*)$", text, re.MULTILINE
    ):
        words = shlex.split(line, comments=True)
        yield words[1:] if words[0] == "memfree" else [Path(words[1]).stem, *words[2:]]


COMMANDS = {
    f"{page_id(page)}: {' '.join(words)}": words for page in PAGES for words in commands_of(page)
}


def commands_where(is_submit):
    return [name for name, words in COMMANDS.items() if (words[0] == "submit") == is_submit]


@pytest.mark.parametrize("command", commands_where(is_submit=False))
def test_commands_have_these_options(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, *options = COMMANDS[command]
    with pytest.raises(SystemExit) as caught:
        entry.run_command(verb, [*options, "--print_config"])
    assert caught.value.code == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_where(is_submit=True))
def test_submitted_commands_have_these_options(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    submit.main([*COMMANDS[command][1:], "--dry_run", "true"])
