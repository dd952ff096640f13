"""Grids of studies: the cells of a grid and their names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

Conditioning = Literal["unconditional", "class", "random_labels", "unique_labels"]
DEFAULT_MODEL = "default"
"""The network that ``--options.train`` describes, without further options."""
LADDER = 0
"""Duplication factor of a model whose data have several."""
LADDER_LABEL = "ladder"
"""Ends the names of such models: no other model may be called so."""
ORACLES = {"oracle_steps": "steps", "oracle_epochs": "epochs"}
"""Subjects that were trained on the deduplicated data, and what they have equal."""


@dataclass(frozen=True)
class Grid:
    """All combinations of its values, each a model to train, for every training seed."""

    conditioning: list[Conditioning] = field(default_factory=lambda: ["unconditional"])
    """What the network is told: nothing, the class, a label drawn at random for each training
    image, or a unique label for each image (Gu et al., 2023)."""
    factor: list[PositiveInt] = field(default_factory=list)
    """Copies of a repeated image in the training set, one data set each; 1: no repetition."""
    ladder: list[list[PositiveInt]] = field(default_factory=list)
    """Data sets that repeat different images differently: [[1, 2, 4, 8]] is one data set."""
    size: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Training images before repetition; 0: all that the source has for training."""
    model: list[str] = field(default_factory=lambda: [DEFAULT_MODEL])
    """Names below --models."""
    steps: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Optimizer steps; 0: those of the study."""


@dataclass(frozen=True)
class Cell:
    """One trained model: its conditioning, data, network and training seed."""

    conditioning: Conditioning
    factors: tuple[int, ...]
    """Copies of a repeated image; several: a ladder, each for images of its own."""
    seed: int
    size: int = 0
    model: str = DEFAULT_MODEL
    steps: int = 0

    @property
    def data(self) -> str:
        """Name of its data, the same for all conditionings that change no label."""
        labels = f"{self.conditioning}-" if self.conditioning.endswith("_labels") else ""
        return f"{labels}{self._data}"

    @property
    def name(self) -> str:
        """Name of its folder, the same in every run."""
        network = "" if self.model == DEFAULT_MODEL else f"-{self.model}"
        steps = f"-{self.steps}-steps" if self.steps else ""
        return f"{self.conditioning}-{self._data}{network}{steps}"

    def __str__(self) -> str:
        return self.name

    @property
    def _data(self) -> str:
        size = f"-n{self.size}" if self.size else ""
        return f"x{'-'.join(map(str, self.factors))}{size}-seed{self.seed}"


def expand(grids: Sequence[Grid], seeds: Sequence[int]) -> list[Cell]:
    """All cells, without repetitions: by training seed, then grid, then in the order of its values.

    Raises:
        ValueError: there are no cells, a ladder is empty, or two cells would share a folder.
    """
    if any(not ladder for grid in grids for ladder in grid.ladder):
        raise ValueError("--grids: a ladder is empty; write one data set as [[1, 2, 4, 8]]")
    cells: dict[Cell, None] = {}
    for seed, grid in itertools.product(seeds, grids):
        factors = [(factor,) for factor in grid.factor]
        ladders = [tuple(sorted(ladder)) for ladder in grid.ladder]
        for conditioning, *data_and_model in itertools.product(
            grid.conditioning, [*factors, *ladders], grid.size, grid.model, grid.steps
        ):
            copies, size, model, steps = data_and_model
            cells[Cell(conditioning, copies, seed, size, model, steps)] = None
    if not cells:
        raise ValueError(
            "the study has no cell: give --grids, each with factor or ladder, and --training_seeds"
        )
    by_name: dict[str, Cell] = {}
    for cell in cells:
        # Some file systems do not tell upper and lower case apart.
        other = by_name.setdefault(cell.name.casefold(), cell)
        if other != cell:
            raise ValueError(
                f"--grids: two models would share the folder {cell.name} (model {other.model!r} "
                f"and model {cell.model!r}): rename one below --models"
            )
    return [*cells]


def model_label(cell: Cell, several_ladders: bool = False) -> str:
    """What a cell has of its own, except its factor and training seed.

    ``several_ladders``: the study has others, so the label says which ladder this is.
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
    """The label that models of all sizes share; names of models contain no comma."""
    return label.replace(f", {size} images", "")


def cell_title(label: str, factor: int) -> str:
    """Label and factor of a cell, as tables show it."""
    return label if factor == LADDER else f"{label} × {factor}"
