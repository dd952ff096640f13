"""Imports go one way, as docs say: a lower layer never imports a higher one."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "memfree"
LAYERS = [
    {
        "folders",
        "first_process",
        "free_word",
        "full_precision",
        "launcher",
        "requeue",
        "memory",
        "option_messages",
        "quiet",
        "bars",
        "console",
        "difference",
        "trainers",
        "diffusion_math",
        "conditions",
        "calibration_size",
        "untrusted",
        "untrusted_yaml",
        "study_files",
    },
    {"data", "models", "retrieval"},
    {"guidance"},
    {"sampling", "indexing", "index_tables", "training", "scratch", "embedding_training"},
    {"evaluation", "tuning", "clip_training"},
    {"stages", "cli", "one_line_errors"},
    {"slurm"},
    {"demo", "study"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports_of(path):
    """Top-level parts of memfree that a file imports when it runs, typing aside."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "memfree" and len(parts) > 1:
                yield parts[1]


def test_every_part_has_a_layer():
    parts = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__", "py"} <= RANK.keys()


def test_no_part_imports_a_higher_one():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in RANK:
            wrong += [
                f"{path.relative_to(SOURCE)} imports {other}"
                for other in imports_of(path)
                if other != part and RANK.get(other, -1) > RANK[part]
            ]
    assert not wrong, wrong


def test_guidance_knows_no_lightning_and_no_files():
    for path in (SOURCE / "guidance").glob("*.py"):
        text = path.read_text()
        assert "import lightning" not in text and "from lightning" not in text, path
        assert "from pathlib" not in text and "open(" not in text, path
