"""What a study writes to be read: its tables as Markdown, and a page with its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from memfree.evaluation.templates import template
from memfree.folders.atomic_files import write_text
from memfree.study.curve_tables import curve_tables
from memfree.study.labels import cell_title
from memfree.study.summary import Summary
from memfree.study.table import Bold, ResultTable
from memfree.study.tables import mean_tables


def write_report(out: Path, summary: Summary, pictures: dict[str, str]) -> None:
    """Write ``out/NAME.md`` and ``out/NAME.html``, the same tables, of the curves first.

    The page needs no network, and holds no training images.

    Args:
        out: the study's folder.
        summary: what it found.
        pictures: names of PNG files in ``out``, and what each shows.
    """
    write_text(out / f"{summary.name}.md", as_markdown(summary))
    write_text(out / f"{summary.name}.html", _page(out, summary, _tables(summary), pictures))


def as_markdown(summary: Summary) -> str:
    """All tables, the curves first."""
    tables, notes = _tables(summary), list[str]()
    if summary.missing:
        notes = [f"{summary.missing} of {summary.cells} cells are not finished and left out.\n"]
    return "\n".join([*notes, *(table.as_markdown() for table in tables)])


def _tables(summary: Summary) -> list[ResultTable]:
    return [*curve_tables(summary), *mean_tables(summary.values)]


def _page(
    out: Path, summary: Summary, tables: Sequence[ResultTable], pictures: dict[str, str]
) -> str:
    done = summary.cells - summary.missing
    folders = {
        (row["label"], row["factor"], row["training_seed"], row["subject"]): row["folder"]
        for row in summary.rows
    }
    return template("report.html", "study").render(
        name=summary.name,
        lead=f"{done} of {summary.cells} trained models are finished."
        if summary.missing
        else f"{summary.cells} trained models.",
        pictures=[
            {"shows": shows, "data": base64.b64encode((out / name).read_bytes()).decode("ascii")}
            for name, shows in pictures.items()
        ],
        tables=[
            {
                "heading": table.heading,
                "text": table.text,
                "titles": table.titles,
                "rows": [
                    [{"text": cell, "bold": isinstance(cell, Bold)} for cell in row]
                    for row in table.rows
                ],
            }
            for table in tables
        ],
        folders=[
            {
                "cell": f"{cell_title(label, factor)}, seed {seed}",
                "subject": subject,
                "folder": folder,
            }
            for (label, factor, seed, subject), folder in folders.items()
        ],
    )
