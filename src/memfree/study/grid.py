"""Grid of a study: its cells and their names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

Conditioning = Literal["unconditional", "class", "random_labels", "unique_labels"]
DEFAULT_MODEL = "default"
"""The network that ``--train`` describes, without further options."""
WHOLE = 0
"""Data size: all training images of the source."""


@dataclass(frozen=True)
class Grid:
    """All combinations of its values, each a model to train, for every training seed."""

    conditioning: list[Conditioning] = field(default_factory=lambda: ["unconditional"])
    """What the network is told: nothing, the class, a label drawn at random for each training
    image, or a label of each image's own (Gu et al., 2023)."""
    factor: list[PositiveInt] = field(default_factory=list)
    """Records of a repeated image, one data set each; 1: nothing is repeated."""
    ladder: list[list[PositiveInt]] = field(default_factory=list)
    """Data sets that repeat different images differently: [[1, 2, 4, 8]] is one data set."""
    size: list[NonNegativeInt] = field(default_factory=lambda: [WHOLE])
    """Training images before repetition; 0: all that the source deals out."""
    model: list[str] = field(default_factory=lambda: [DEFAULT_MODEL])
    """Names below --models."""
    steps: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Optimizer steps; 0: those of the study."""


@dataclass(frozen=True)
class Cell:
    """One trained model: its conditioning, data, network and training seed."""

    conditioning: Conditioning
    factors: tuple[int, ...]
    """Records of a repeated image; several: a ladder, each for images of its own."""
    seed: int
    size: int = WHOLE
    model: str = DEFAULT_MODEL
    steps: int = 0

    @property
    def data(self) -> str:
        """Name of its data, the same for all conditionings that change no label."""
        labels = f"{self.conditioning}-" if self.conditioning.endswith("_labels") else ""
        return f"{labels}{self._data}"

    @property
    def name(self) -> str:
        """Its folder's name, the same in every run."""
        network = "" if self.model == DEFAULT_MODEL else f"-{self.model}"
        steps = f"-{self.steps}-steps" if self.steps else ""
        return f"{self.conditioning}-{self._data}{network}{steps}"

    @property
    def _data(self) -> str:
        size = f"-n{self.size}" if self.size else ""
        return f"x{'-'.join(map(str, self.factors))}{size}-seed{self.seed}"


def expand(grids: Sequence[Grid], seeds: Sequence[int]) -> list[Cell]:
    """All cells, without repetitions: by seed, then grid, then in the order of its values.

    Args:
        grids: their union is the study.
        seeds: training seeds.

    Raises:
        ValueError: there is none, a ladder has no step, or two cells would share a folder.
    """
    if any(not ladder for grid in grids for ladder in grid.ladder):
        raise ValueError("--grids: a ladder is empty; write one data set as [[1, 2, 4, 8]]")
    cells = [
        Cell(conditioning, factors, seed, size, model, steps)
        for seed in seeds
        for grid in grids
        for conditioning, factors, size, model, steps in itertools.product(
            grid.conditioning,
            [*((factor,) for factor in grid.factor), *(tuple(sorted(one)) for one in grid.ladder)],
            grid.size,
            grid.model,
            grid.steps,
        )
    ]
    if not cells:
        raise ValueError(
            "the study has no cell: give --grids, each with factor or ladder, and --training_seeds"
        )
    cells = list(dict.fromkeys(cells))
    by_name: dict[str, Cell] = {}
    for cell in cells:
        # Some file systems take upper and lower case for one.
        other = by_name.setdefault(cell.name.casefold(), cell)
        if other != cell:
            raise ValueError(
                f"--grids: two models would share the folder {cell.name} (model {other.model!r} "
                f"and model {cell.model!r}): rename one below --models"
            )
    return cells


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
