"""List the tests that take long in tests/slow_tests.txt, from the log of a run with --durations=0.

    make test PYTEST_OPTIONS=--durations=0 | tee log; python tests/slow_tests.py log

A test takes what its calls and set-ups take together, whatever its parameters. A file whose set-ups
take long is listed whole: without its first test, the next one would pay for them.
"""

import re
import sys
from collections import Counter
from pathlib import Path

SECONDS = 0.4
"""Longer is slow."""
SETUP_SECONDS = 4.0
LINE = re.compile(r"([\d.]+)s (call|setup|teardown) +(tests/\S+?)(::[^\[\s]+)")


def main() -> None:
    """Read the log that is named and write the list."""
    seconds: Counter[str] = Counter()
    setups: Counter[str] = Counter()
    for line in Path(sys.argv[1]).read_text().splitlines():
        if match := LINE.match(line):
            duration, what, file, test = match.groups()
            seconds[file + test] += float(duration)
            setups[file] += float(duration) * (what == "setup")
    slow = sorted(
        {name for name, total in seconds.items() if total > SECONDS}
        | {file for file, total in setups.items() if total > SETUP_SECONDS}
    )
    Path(__file__).with_name("slow_tests.txt").write_text("\n".join(slow) + "\n")


if __name__ == "__main__":
    main()
