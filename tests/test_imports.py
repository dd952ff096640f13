"""Imports go one way: every part of the package knows only the parts below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "memfree"
LAYERS = [
    "console",
    "full_precision",
    "conditions",
    "diffusion_math",
    "images",
    "out_of_memory",
    "slurm",
    "folders",
    "data",
    "retrieval",
    "models",
    "training",
    "guidance",
    "sampling",
    "pipeline_guard",
    "evaluation",
    "cli",
    "study",
    "offline",
    "commands",
]
"""From the lowest to the highest, each by itself (docs/architecture.md)."""
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def imports_of(path):
    """Modules of memfree that a file imports anywhere, also for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "memfree":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def part_of(module):
    return module.split(".")[1] if "." in module else None


def test_every_part_has_a_layer():
    parts = {part_of(module) for module in MODULES} - {None}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_part_imports_lower_parts_alone(layer):
    below = {*LAYERS[: LAYERS.index(layer) + 1], None}
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if part_of(module) == layer
        for other in imports_of(path)
        if part_of(other) not in below
    ]
    assert not wrong, wrong


def test_no_modules_import_each_other():
    edges = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}
    while free := {module for module, others in edges.items() if not others & edges.keys()}:
        for module in free:
            del edges[module]
    # What is left is a circle, or leads to one.
    assert not edges, sorted(edges)


def test_at_most_six_modules_stand_loose():
    loose = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 6, loose


def test_guidance_knows_no_lightning_and_no_files():
    for path in (SOURCE / "guidance").rglob("*.py"):
        text = path.read_text()
        assert "import lightning" not in text and "from lightning" not in text, path
        assert "from pathlib" not in text and "open(" not in text, path
