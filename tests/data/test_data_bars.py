"""The progress bar that prepare and index share."""

import io

from rich.console import Console

from memfree.console import counting_bar


def test_a_line_a_task():
    out = io.StringIO()
    with counting_bar(Console(file=out, force_terminal=True, width=80)) as bar:
        bar.advance(bar.add_task("read", total=4), 3)
        bar.add_task("write", total=None)
    lines = [line for line in out.getvalue().splitlines() if "3/4" in line]
    assert lines and "read" in lines[-1]
    assert "write" in out.getvalue() and "0/?" in out.getvalue()
