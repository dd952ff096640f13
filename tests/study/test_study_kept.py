"""Tables of a study from its CSV: those that are published, and what is refused."""

from pathlib import Path

import pytest

from memfree.study.kept import main, read_summary
from memfree.study.page import as_markdown

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STUDIES = (
    *("duplication_ladder", "data_size", "conditioning", "mitigations"),
    *("oracle", "settings", "ablation"),
)


@pytest.mark.parametrize("name", STUDIES)
def test_published_tables_are_those_of_the_published_rows(name):
    summary = read_summary(RESULTS / f"{name}.csv")
    assert (RESULTS / f"{name}.md").read_text() == as_markdown(summary)


def test_the_ladders_midpoint_is_students_over_three_seeds():
    (fit,) = read_summary(RESULTS / "duplication_ladder.csv").fits().values()
    assert (fit.midpoint.low, fit.midpoint.high) == pytest.approx((27.8, 43.6), abs=0.05)


def test_tables_and_picture_are_written_beside_the_rows(tmp_path):
    rows = tmp_path / "data_size.csv"
    rows.write_bytes((RESULTS / "data_size.csv").read_bytes())
    main([str(rows), "--pictures", str(tmp_path)])
    assert rows.with_suffix(".md").read_text() == (RESULTS / "data_size.md").read_text()
    assert rows.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", 'a,b\n1\n"'])
def test_what_is_no_study_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.csv"):
        read_summary(path)
