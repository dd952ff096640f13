"""What a study measures: its metrics, their names, the goals, and the figures by key."""

from __future__ import annotations

from memfree.study.statistics import Measured

Key = tuple[str, int, str, str]
"""Model (conditioning and what else is not the study's default), duplication factor, subject,
metric."""
Values = dict[Key, dict[int, Measured]]
"""What was measured, by key and training seed."""

RATES = {
    "copies": "copies, %",
    "second_copies": "second measure, %",
    "duplicated_share": "nearest is repeated, %",
    "class_agreement": "class agreement, %",
}
DISTANCES = {
    "frechet_pixels": "Fréchet, pixels",
    "frechet_efficientnet": "Fréchet, EfficientNet",
}
SHOWN = {**RATES, **DISTANCES}
"""Metrics of the tables and their titles. Seconds are left to quiet machines: studies may share
theirs, and the first sampling of a model pays for its warm-up."""

RATIO = "distance_ratio_below_third"
"""Share of samples with d_1/d_2 < 1/3, what Gu et al. (2023) count as copies."""

MARGINS = {
    "copies": 0.005,
    "second_copies": 0.005,
    "duplicated_share": 0.015,
    "frechet_pixels": 0.15,
    "frechet_efficientnet": 0.15,
}
"""Goals, fixed beforehand: upper limits of (both − oracle), of Fréchet distances relative to the
oracle's."""

ORACLES = {"oracle_steps": "steps", "oracle_epochs": "epochs"}
"""Subjects that were trained on the deduplicated data, and what they have equal."""


def cells_of(values: Values) -> list[tuple[str, int]]:
    """Model and factor of every cell: unconditional models first, as they come, by factor."""
    place = {model: number for number, model in enumerate(dict.fromkeys(key[0] for key in values))}
    return sorted(
        {key[:2] for key in values},
        key=lambda cell: (not cell[0].startswith("unconditional"), place[cell[0]], cell[1]),
    )


def subjects_of(values: Values, model: str, factor: int) -> list[str]:
    """Subjects of a cell that copies were counted of, in the order of their evaluation."""
    found = dict.fromkeys(key[2] for key in values if key[:2] == (model, factor))
    return [one for one in found if (model, factor, one, "copies") in values]
