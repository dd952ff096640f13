"""Imports go one way: every part of the package knows only the parts below it."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from draw_layers import LAYERS, MODULES, PICTURE, SOURCE, drawn, imports_of, part_of

sys.path.pop(0)


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
    # memfree itself comes with each of its modules, and loads its public names at their first use.
    edges = {
        module: set(imports_of(path)) - {module, "memfree"} for module, path in MODULES.items()
    }
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


def test_the_picture_of_the_layers_is_of_these_imports():
    told = Image.open(PICTURE).info["Description"]
    assert told == drawn(), "run python docs/draw_layers.py"
