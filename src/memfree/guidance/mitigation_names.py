"""Mitigation names, what each needs, and constants that options share with guidance."""

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


Through = Literal["clean_estimate", "denoiser"]
"""What the gradient is taken through: x̂_0 with ε̂ held constant, or the denoiser too."""


CAPTION_NEIGHBOURS = 10
"""k of ``most_common``; 1000 in the authors' code, of the two billion images of LAION."""


CAPTION_RECORDS = 5
"""m of ``most_common``; 20 in the authors' code."""
