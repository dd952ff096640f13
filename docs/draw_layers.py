"""Layers of the package, and docs/architecture.png: drawn from the imports of every file.

Run python docs/draw_layers.py after a layer, its docstring or an import between layers changed.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "memfree"
PICTURE = Path(__file__).with_name("architecture.png")
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
"""From the lowest to the highest; each imports lower ones alone (tests/test_imports.py)."""
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
"""Every file of the package by its module name."""


def imports_of(path: Path) -> Iterator[str]:
    """Modules of memfree that a file imports anywhere, also for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "memfree":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def part_of(module: str) -> str | None:
    """The layer of a module: its package or loose file; None for memfree itself."""
    return module.split(".")[1] if "." in module else None


def imported_parts() -> dict[str, set[str]]:
    """By layer, the other layers that any of its files imports."""
    parts: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for module, path in MODULES.items():
        if layer := part_of(module):
            parts[layer] |= {part_of(other) for other in imports_of(path)} - {layer, None}
    return parts


def arrows() -> dict[str, set[str]]:
    """By layer, the imported layers that no other of its imports leads to.

    The lowest row has no arrows: any layer may import it.
    """
    parts = imported_parts()

    def reached(layer: str) -> set[str]:
        return parts[layer].union(*map(reached, parts[layer]))

    return {
        layer: {
            low for low in lower if parts[low] and not any(low in reached(other) for other in lower)
        }
        for layer, lower in parts.items()
    }


def drawn() -> str:
    """What the picture shows, as text that is kept in the file: test_imports.py compares it."""
    return "\n".join(
        f"{layer} ({summary(layer)}) > {', '.join(sorted(low))}" for layer, low in arrows().items()
    )


def rows() -> list[list[str]]:
    """Layers by height: those of a row import nothing of their own row or of one above."""
    parts = imported_parts()
    height: dict[str, int] = {}
    for layer in LAYERS:
        height[layer] = max((height[low] + 1 for low in parts[layer]), default=0)
    return [[name for name in LAYERS if height[name] == h] for h in range(1 + max(height.values()))]


def summary(layer: str) -> str:
    """First line of a layer's docstring."""
    module = ast.parse(MODULES[f"memfree.{layer}"].read_text())
    return (ast.get_docstring(module) or "").splitlines()[0].replace("`", "")


def draw() -> None:
    """Write the picture."""
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(13, 11))
    across, step, tall = 14.0, 1.25, 0.8
    where: dict[str, tuple[float, float]] = {}  # centre and bottom of a box
    for row, names in enumerate(rows()):
        if row:  # each above what it imports
            names.sort(key=lambda name: sum(where[low][0] for low in arrows()[name]))
        for i, name in enumerate(names):
            where[name] = across * (i + 0.5) / len(names), row * step
    for names in rows():
        width, small = min(4.2, across / len(names) - 0.12), len(names) > 3
        for name in names:
            centre, bottom = where[name]
            loose = MODULES[f"memfree.{name}"].parent == SOURCE
            low_edge = bottom if where[name][1] else bottom - 0.5  # room for the loose files' words
            axes.add_patch(
                FancyBboxPatch(
                    (centre - width / 2, low_edge),
                    width,
                    bottom + tall - low_edge,
                    boxstyle="round,pad=0,rounding_size=0.1",
                    facecolor="#f2f2f2" if loose else "#dcebfa",
                    edgecolor="#5b6b7b",
                )
            )
            label, top = f"{name}.py" if loose else f"{name}/", bottom + tall
            style = {"ha": "center", "va": "top"}
            axes.text(centre, top - 0.08, label, **style, weight="bold", size=8 if small else 10)
            words = textwrap.fill(summary(name), int(width * (12 if small else 13)))
            axes.text(centre, top - 0.34, words, **style, size=7 if small else 7.5)
    for name, lower in arrows().items():
        for low in lower:
            (x, y), (x_low, y_low) = where[name], where[low]
            style = {"arrowstyle": "-|>", "color": "#5b6b7b", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x_low, y_low + tall), (x, y), arrowprops=style, zorder=0)
    axes.text(0, 0.92, "imported by any layer:", size=8, style="italic", va="bottom")
    axes.set(xlim=(0, across), ylim=(-0.55, len(rows()) * step - 0.3))
    axes.axis("off")
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight", metadata={"Description": drawn()})


if __name__ == "__main__":
    draw()
