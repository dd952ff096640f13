"""Detection against 50 000 references, over the bare matrix product, ``queries @ references.T``.

``python benchmarks/detection.py`` writes benchmarks/results/detection.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import Records, additional_memory, compared, interleaved, measure, record
from torch import Tensor

from memfree.guidance import MultiplicityGuidance, NormalizedL2
from memfree.guidance.prediction import Prediction
from memfree.retrieval import ReferenceIndex

SHAPE = (3, 32, 32)


class Size(NamedTuple):
    """How much is measured."""

    rows: int
    """References."""
    batch: int
    """Queries at a time."""
    few: int
    """Queries at a time of a small batch."""
    repetitions: int


FULL, TINY = Size(50_000, 64, 16, 9), Size(100, 8, 4, 2)
AUTHORS_SECONDS = 8.6
"""The authors' code (AMG-iddpm), seconds a sample and step on a 2-core CPU at these sizes."""


def pictures(count: int, generator: torch.Generator) -> Tensor:
    """Smooth random colour images (count, 3, 32, 32) in [-1, 1], with CIFAR-10's size."""
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    return (
        smooth.mul_(0.5).add_(0.05 * torch.randn(count, *SHAPE, generator=generator)).clamp_(-1, 1)
    )


def run(tiny: bool = False) -> Records:
    """Measure; one record a comparison (see ``harness.record``)."""
    rows, batch, few, repetitions = TINY if tiny else FULL
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    references = pictures(rows, generator)
    # Half of the queries are near a reference, as late in sampling, half are not.
    near = references[:: rows // (batch // 2)][: batch // 2]
    near = near + 0.02 * torch.randn(near.shape, generator=generator)
    queries = torch.cat([near, pictures(batch // 2, generator)]).to(device)
    counts = torch.ones(rows, dtype=torch.int64)
    counts[::500] = 64

    index = ReferenceIndex.build(references, groups=range(rows), counts=counts).to(device)
    name = f"detection (nL2, k = 50), batch {batch}, {rows} x 3072 / matrix product"
    detection = _detection(name, index, queries, repetitions)
    per_sample = detection["ours"] / batch
    records = [
        detection,
        _precision(index, queries, repetitions),
        record(
            "detection a sample-step / the authors' code, as measured on 2 cores",
            per_sample,
            AUTHORS_SECONDS,
            "s",
            times_faster=AUTHORS_SECONDS / per_sample,
        ),
        _multiplicity(index, queries, 0.9, repetitions),
        _multiplicity(index, queries, 0.05, repetitions),
        _multiplicity(index, queries, 0.01, repetitions),
        _products(index, queries[:few], repetitions),
    ]
    del index
    # A fifth in groups of 5 among singletons: the search must look for distinct groups.
    groups = [row // 5 if row < rows // 5 else row for row in range(rows)]
    grouped = ReferenceIndex.build(references, groups=groups).to(device)
    name = f"detection with {rows // 25} groups of 5 / matrix product"
    return [*records, _detection(name, grouped, queries, repetitions)]


def _detection(
    name: str, index: ReferenceIndex, queries: Tensor, repetitions: int
) -> dict[str, Any]:
    """σ of eq. 8 for a batch, search included, over one product of queries and references."""
    similarity, flat = NormalizedL2(k=50), queries.flatten(1)
    functions = {
        "product": lambda: flat @ index.vectors.T,
        "detect": lambda: similarity(index, queries),
    }
    timings = interleaved(functions, repetitions)
    return compared(
        name,
        timings,
        "detect",
        "product",
        limit=2.0,
        index_bytes=2 * index.vectors.numel() * index.vectors.element_size(),
        additional_bytes=additional_memory(functions["detect"]),
    )


def _precision(index: ReferenceIndex, queries: Tensor, repetitions: int) -> dict[str, Any]:
    """The same detection where the user has set what Lightning recommends on GPUs, over without."""
    similarity = NormalizedL2(k=50)

    def detect() -> object:
        return similarity(index, queries)

    timings = interleaved({"high": _in_precision("high", detect), "default": detect}, repetitions)
    name = f"detection, batch {len(queries)}, torch.set_float32_matmul_precision high / default"
    return compared(name, timings, "high", "default", limit=1.1)


def _in_precision(precision: str, function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def _multiplicity(
    index: ReferenceIndex, x_t: Tensor, alpha_bar: float, repetitions: int
) -> dict[str, Any]:
    """One unconditional correction of multiplicity guidance over two bare products.

    At little noise nearly all references weigh nothing, and are left out of the second product.
    """
    guidance = MultiplicityGuidance(index)
    output = torch.zeros_like(x_t)
    prediction = Prediction(
        x_t=x_t,
        alpha_bar=torch.tensor(alpha_bar, device=x_t.device),
        time=0.1,
        output=output,
        output_cond=None,
        output_uncond=output,
        conditions=None,
        guidance_scale=1.0,
        prediction_type="epsilon",
        denoise=lambda x, conditions: torch.zeros_like(x),
    )
    flat = x_t.flatten(1)
    functions = {
        "products": lambda: (flat @ index.vectors.T) @ index.vectors,
        "correct": lambda: guidance(prediction),
    }
    timings = interleaved(functions, repetitions)
    return compared(
        f"multiplicity guidance at ᾱ = {alpha_bar:g}, batch {len(x_t)}, {len(index.vectors)} x "
        f"{flat.shape[1]} / two products",
        timings,
        "correct",
        "products",
        additional_bytes=additional_memory(functions["correct"]),
    )


def _products(index: ReferenceIndex, queries: Tensor, repetitions: int) -> dict[str, Any]:
    """Our order of the product with all references, which the two above are made of."""
    flat = queries.flatten(1)
    functions = {
        "plain": lambda: flat @ index.vectors.T,
        "ours": lambda: index.references.products(flat),
    }
    timings = interleaved(functions, repetitions)
    name = f"one product, batch {len(flat)}, {len(index.vectors)} x 3072 / queries @ references.T"
    return compared(name, timings, "ours", "plain")


if __name__ == "__main__":
    measure("detection", run)
