"""What a trained model is called in tables and pictures."""

from __future__ import annotations

from memfree.study.cells import DEFAULT_MODEL, Cell

LADDER = 0
"""Duplication factor of a model whose data have several."""
LADDER_LABEL = "ladder"
"""How the names of such models end: no other model may be called so."""


def model_label(cell: Cell, several_ladders: bool = False) -> str:
    """A cell's conditioning and what else it has of its own, but its factor and training seed.

    Args:
        cell: one of the study's.
        several_ladders: whether the study has others, so that the name must say which this is.
    """
    parts = [cell.conditioning.replace("_", " ")]
    parts += [f"{cell.size} images"] if cell.size else []
    parts += [cell.model] if cell.model != DEFAULT_MODEL else []
    parts += [f"{cell.steps} steps"] if cell.steps else []
    if len(cell.factors) > 1:
        which = f" {'-'.join(map(str, cell.factors))}" if several_ladders else ""
        parts.append(f"{LADDER_LABEL}{which}")
    return ", ".join(parts)


def without_size(label: str, size: int) -> str:
    """The label that models of all sizes have in common; names of models have no comma."""
    return label.replace(f", {size} images", "")


def cell_title(label: str, factor: int) -> str:
    """A cell as it stands in tables: its label, which of a ladder says all, and its factor."""
    return label if factor == LADDER else f"{label} × {factor}"
