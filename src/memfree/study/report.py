"""The page of a study: its pictures, its tables, and links to the folders behind each row."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memfree.evaluation.templates import template
from memfree.manifest import write_text
from memfree.study.summary import Summary
from memfree.study.tables import cell_title


@dataclass
class PageTable:
    """One table of the page."""

    heading: str
    text: str = ""
    titles: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def write_report(out: Path, summary: Summary, pictures: Sequence[str]) -> None:
    """Write ``out/NAME.html``, one page that needs no network; it holds no training images.

    Args:
        out: the study's folder.
        summary: what it found.
        pictures: names of PNG files in ``out``.
    """
    done = summary.cells - summary.missing
    folders = {
        (row["label"], row["factor"], row["training_seed"], row["subject"]): row["folder"]
        for row in summary.rows
    }
    text = template("report.html", "study").render(
        name=summary.name,
        lead=f"{done} of {summary.cells} trained models are finished."
        if summary.missing
        else f"{summary.cells} trained models.",
        pictures=[
            {"name": name, "data": base64.b64encode((out / name).read_bytes()).decode("ascii")}
            for name in pictures
        ],
        tables=tables_of(summary.as_markdown()),
        folders=[
            {
                "cell": f"{cell_title(label, factor)}, seed {seed}",
                "subject": subject,
                "folder": folder,
            }
            for (label, factor, seed, subject), folder in folders.items()
        ],
    )
    write_text(out / f"{summary.name}.html", text)


def tables_of(markdown: str) -> list[PageTable]:
    """The tables of a text that has headings, paragraphs and tables, and nothing else."""
    tables: list[PageTable] = []
    for line in markdown.splitlines():
        if line.startswith("### "):
            tables.append(PageTable(line.removeprefix("### ")))
        elif line.startswith("|---") or not line.strip() or not tables:
            continue
        elif line.startswith("| "):
            cells = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
            if tables[-1].titles:
                tables[-1].rows.append(cells)
            else:
                tables[-1].titles = cells
        else:
            tables[-1].text = f"{tables[-1].text} {line}".strip()
    return tables
