"""``memfree report``: write the HTML page of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from memfree.console import plain_console
from memfree.folders.atomic import write_atomic, write_text
from memfree.folders.claim import check_kind
from memfree.folders.lock import one_writer
from memfree.folders.manifest import save_config, write_manifest
from memfree.folders.untrusted import short


def report(evaluation: Path, out: Path | None = None) -> None:
    """Write an evaluation as one HTML page that needs no network, and a picture for a README.

    The page contains training images; share it as you would the data.

    Args:
        evaluation: folder that `memfree evaluate` wrote.
        out: folder for index.html and picture.png; default: `report` in the evaluation's folder.
    """
    from memfree.evaluation import page
    from memfree.evaluation.folder import EvaluationFolder
    from memfree.evaluation.plots import write_picture

    target = evaluation / "report" if out is None else out
    check_kind(target, "report")
    folder = EvaluationFolder(evaluation)
    folder.check_figures()
    # The command line locks an --out only.
    with one_writer(target) if out is None else nullcontext():
        with _drawing(folder.path):
            text = page.report_page(folder)
            write_atomic(target / "picture.png", lambda path: write_picture(folder, path))
        # A name that is not UTF-8 is written out.
        write_text(target / "index.html", text.encode("utf-8", "backslashreplace").decode("utf-8"))
        save_config(target)
        write_manifest(target, "report", evaluation=str(evaluation), contains="training images")
    line = f"Written to {target / 'index.html'}; it contains training images."
    plain_console().print(line, soft_wrap=True)


@contextmanager
def _drawing(path: Path) -> Iterator[None]:
    """Name the folder when a drawing library fails on absurd numbers in it."""
    try:
        yield
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} cannot be drawn ({short(error)}); run `memfree evaluate` again"
        ) from error
