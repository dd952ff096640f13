"""The mitigations there are, by name, and what they need."""

from __future__ import annotations

from typing import Literal

MitigationName = Literal[
    "none",
    "amg",
    "multiplicity",
    "both",
    "reject",
    "lower_guidance",
    "rt",
    "rna",
    "cwr",
    "gni",
    "wen",
    "ren",
    "jain",
    "prss",
    "sail",
]
WITH_AMG = ("amg", "both")
"""Mitigations that AMG is part of."""
WITH_INDEX = ("amg", "multiplicity", "both", "reject")
"""Mitigations that need a reference index."""
TEXT_ONLY = ("lower_guidance", "rt", "rna", "cwr", "gni", "wen", "ren", "jain", "prss", "sail")
"""The field's baselines (docs/baselines.md), which run on text-to-image models alone."""
