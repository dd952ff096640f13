"""Guard report: a trace of every step and a verdict for each image."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import pyarrow as pa
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from memfree.console import shown
from memfree.sampling.loop import TRACE_COLUMNS

NOT_COVERED = (
    "A copy is a whole image that is near a whole image of the index. Not covered: crops and "
    "mirrored images (as far as the index's features miss them), copied parts, style and content, "
    "and every image that is not in the index."
)


@dataclass(frozen=True)
class Verdict:
    """What the index says about one finished image."""

    call: int  # number of the pipeline call in the block, from 0
    image: int  # position among the images of that call
    nearest: str  # key of the nearest image in the index
    similarity: float  # σ of the index's similarity; higher is nearer
    threshold: float  # σ above which an image counts as a copy
    false_positive_rate: float  # share of held-out real images above the threshold
    p_value: float  # share of the N held-out real images as near: (1 + number as near) / (1 + N)
    copy: bool  # whether σ is above the threshold
    finite: bool = True  # if not: ``nearest`` is empty, σ and p-value NaN, ``copy`` False
    finished: bool = True  # if not (``denoising_end``, interruption): of the last estimate
    draws: int = 1  # how often the image was drawn, including this one
    refused: bool = False  # whether the guard returned None instead
    reason: str = ""  # why it was drawn again or refused; empty if the first draw was accepted
    rate_text: str = ""  # that rate with its limits: ``1 % (0.4–1.9 %, from 600 images)``


@dataclass
class GuardReport:
    """Trace and verdicts of all pipeline calls in a ``guard`` block; printable."""

    verdicts: list[Verdict] = field(default_factory=list)  # one per image, in call order
    seed: int = 0  # of redraws and mitigations; ``guard(…, seed=…)`` repeats them
    not_covered: str = NOT_COVERED  # what no verdict covers
    calls: int = 0  # pipeline calls so far
    unmoved: list[int] = field(default_factory=list)  # calls whose last step ignores predictions
    outside: int = 0  # unguarded denoiser calls by other pipelines that share it
    left_out: list[str] = field(default_factory=list)  # guidance that the pipeline cannot use
    _trace: list[dict[str, Tensor]] = field(default_factory=list, repr=False)

    @property
    def trace(self) -> pa.Table:
        """One row per image and step: what guidances recorded, and NaN for what they did not.

        Columns: call, draw (from 0), sample, step, t, ``TRACE_COLUMNS`` (``nearest``: row of the
        index), then others such as ``wen_norm``."""
        names = ["call", "draw", "sample", "step", "t", *TRACE_COLUMNS]
        if not self._trace:
            return pa.table({name: pa.array([], pa.float64()) for name in names})
        names += [name for name in self._trace[0] if name not in names]
        return pa.table(
            {name: torch.cat([part[name] for part in self._trace]).numpy() for name in names}
        )

    @property
    def copies(self) -> list[Verdict]:
        """Verdicts on images that were still copies at the end, returned or refused."""
        return [verdict for verdict in self.verdicts if verdict.copy]

    def table(self) -> pa.Table:
        """The verdicts as a table with the fields of ``Verdict`` as columns."""
        names = [field.name for field in fields(Verdict)]
        return pa.table({name: [getattr(each, name) for each in self.verdicts] for name in names})

    def add_trace(self, call: int, draw: int, images: list[int], rows: dict[str, Tensor]) -> None:
        """Keep one step of one draw; ``images`` are the samples' positions in the call."""
        own = {
            "call": torch.full((len(images),), call),
            "draw": torch.full((len(images),), draw),
            "sample": torch.tensor(images),
        }
        self._trace.append({name: column.detach().cpu() for name, column in rows.items()} | own)

    def __rich__(self) -> Group:
        table = Table(title="memfree.guard", title_justify="left")
        for name in ("image", "nearest", "similarity", "threshold", "p", "verdict"):
            table.add_column(name, justify="left" if name in ("nearest", "verdict") else "right")
        for verdict in self.verdicts:
            table.add_row(
                f"{verdict.call}.{verdict.image}",
                Text(shown(verdict.nearest)),
                f"{verdict.similarity:.3f}" if verdict.finite else "",
                f"{verdict.threshold:.3f}",
                f"{verdict.p_value:.3g}" if verdict.finite else "",
                Text(shown(_in_words(verdict))),
            )
        return Group(table, *self._notes(), self.not_covered)

    def _notes(self) -> Iterator[str]:
        images = f"of {len(self.verdicts)} images are not"
        if self.verdicts:
            first = self.verdicts[0]
            rate = first.rate_text or f"{100 * first.false_positive_rate:g} %"
            yield f"The threshold calls {rate} of held-out real images copies."
        if self.unmoved:
            yield (
                "The last step of the scheduler does not follow the prediction: the last "
                f"correction was left out in {len(self.unmoved)} of {self.calls} calls."
            )
        if broken := sum(not verdict.finite for verdict in self.verdicts):
            yield (
                f"{broken} {images} finite (NaN or infinity in their pixels or latents): nothing "
                "can be said of them."
            )
        if unfinished := sum(not verdict.finished for verdict in self.verdicts):
            yield (
                f"{unfinished} {images} finished (denoising_end, or an interrupted call): their "
                "verdicts are of the clean estimate of the last step that was made."
            )
        if self.outside:
            yield (
                f"The denoiser was called {self.outside} times by something else than the guarded "
                "pipeline: what was made there is neither guided nor judged."
            )
        yield from self.left_out
        if any(verdict.draws > 1 for verdict in self.verdicts):
            yield f"Further draws are of seed {self.seed}."

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, file=io.StringIO())
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()


def _in_words(verdict: Verdict) -> str:
    words = "refused" if verdict.refused else "copy" if verdict.copy else "no copy"
    if not verdict.finite:
        words = "not finite, no verdict"
    elif not verdict.finished:
        words += " (not finished)"
    return f"{words}: {verdict.reason}" if verdict.reason else words
