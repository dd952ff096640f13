"""Tables and pictures of a study from its CSV: ``python -m memfree.study.kept NAME.csv``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyarrow.csv as pa_csv
from pyarrow import ArrowInvalid

from memfree.folders.atomic import write_text
from memfree.study.curves import write_curves
from memfree.study.page import as_markdown
from memfree.study.results import by_key
from memfree.study.summary import SCHEMA, Summary

NEEDED = ("conditioning", "factor", "training_seed", "subject", "metric", "value", "count")
"""Columns that files of older versions have too."""


def read_summary(path: Path) -> Summary:
    """What a study found, from the NAME.csv that ``memfree study`` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not the CSV of a study.
    """
    try:
        rows = pa_csv.read_csv(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    for name in NEEDED:
        if not rows or name not in rows[0]:
            raise ValueError(f"{path} is not the CSV of a study: it has no column {name}")
    empty = dict.fromkeys(SCHEMA.names)
    rows = [{**empty, "label": row["conditioning"].replace("_", " "), **row} for row in rows]
    return Summary(path.stem, by_key(rows), rows, 0, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write NAME.md, and the curves as NAME.png where there are any, beside each NAME.csv."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="NAME.csv of `memfree study`")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; none without it")
    given = parser.parse_args(arguments)
    for path in given.csv:
        summary = read_summary(path)
        write_text(path.with_suffix(".md"), as_markdown(summary))
        if given.pictures is not None:
            write_curves(given.pictures / f"{summary.name}.png", summary)


if __name__ == "__main__":
    main()
