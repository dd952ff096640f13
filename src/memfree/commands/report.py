"""``memfree report``: write the HTML page of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from markupsafe import Markup

from memfree.console import plain_console
from memfree.folders.atomic import write_atomic, write_text
from memfree.folders.claim import check_kind
from memfree.folders.lock import one_writer
from memfree.folders.manifest import save_config, write_manifest
from memfree.folders.untrusted import short

TYPE_CHECKING = False  # not typing's, whose imports jsonargparse would run for --help
if TYPE_CHECKING:
    from memfree.evaluation.folder import EvaluationFolder


def report(evaluation: Path, out: Path | None = None) -> None:
    """Write an evaluation as one HTML page that needs no network, and a picture for a README.

    The page holds the pictures, so it contains training images; share it as you would the data.

    Args:
        evaluation: folder that `memfree evaluate` wrote.
        out: folder for index.html and picture.png; `report` in the evaluation's folder by default.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is unfinished, damaged, or no evaluation, or ``out`` holds something else.
    """
    from memfree.evaluation.folder import EvaluationFolder
    from memfree.evaluation.pictures import write_picture

    target = evaluation / "report" if out is None else out
    check_kind(target, "report")
    folder = EvaluationFolder(evaluation)
    folder.check_figures()
    # The command line locks an --out only.
    with one_writer(target) if out is None else nullcontext():
        with _drawing(folder):
            text = render(folder)
            write_atomic(target / "picture.png", lambda path: write_picture(folder, path))
        # A name that is not UTF-8 is written out.
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
        write_text(target / "index.html", shown)
        save_config(target)
        write_manifest(target, "report", evaluation=str(evaluation), contains="training images")
    line = f"Written to {target / 'index.html'}; it contains training images."
    plain_console().print(line, soft_wrap=True)


@contextmanager
def _drawing(folder: EvaluationFolder) -> Iterator[None]:
    """Name the folder in whatever a drawing library makes of absurd numbers in it."""
    try:
        yield
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        if str(folder.path) in str(error):
            raise
        raise ValueError(
            f"{folder.path} cannot be drawn ({short(error)}); run `memfree evaluate` again"
        ) from error


def render(folder: EvaluationFolder) -> str:
    """The page's HTML."""
    from memfree.evaluation import page
    from memfree.evaluation import page as making

    headline, lead = page.headline(folder)
    data = folder.manifest["dataset"]["manifest"]
    source = (data.get("source") or {}).get("name", "images")
    from memfree.evaluation.page import template

    return template("report.html").render(
        title=Markup(headline).striptags(),
        eyebrow=f"memorization of {source}, measured {folder.manifest['made_by']['created'][:10]} "
        "· this page contains training images",
        headline=headline,
        lead=lead,
        strip=page.strip(folder),
        table=page.figures(folder),
        differences=page.differences(folder),
        reference=folder.reference,
        charts=_charts(folder),
        known_copies=page.known_copies(folder),
        limits=page.LIMITS,
        facts=making.facts(folder),
        commands=making.commands(folder),
        settings=making.settings(folder),
    )


def _charts(folder: EvaluationFolder) -> dict[str, Markup | str | None]:
    from memfree.evaluation.metrics import HELDOUT
    from memfree.evaluation.plots import distance_chart, dose_chart, trajectory_chart

    main = folder.metrics.get("copies", HELDOUT)
    assert main is not None
    nl2 = folder.metrics.get("nl2_minimum", HELDOUT) is not None
    what = "nL2 to the nearest training image" if nl2 else "negated similarity to it"
    distance = distance_chart(folder.distances(), -main.detail["threshold"], what, folder.subjects)
    measured = [*folder.paired] if folder.paired else []
    subjects = [folder.reference, *measured]
    trajectory = trajectory_chart(folder.trajectories, subjects, folder.reference)
    dose = dose_chart(folder.metrics, folder.subjects)
    rate = 100 * main.detail["false_positive_rate"]
    return {
        "trajectory": Markup(trajectory) if trajectory else None,
        "dose": Markup(dose) if dose else None,
        "distance": Markup(distance),
        "distance_caption": "How far images are from their nearest training image. Left of the "
        f"line are copies; {rate:g} % of held-out images are expected there.",
    }
