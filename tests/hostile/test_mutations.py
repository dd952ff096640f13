"""Every value of every manifest, removed or replaced: read, or refused in one line, by each reader.

Those of evaluations are in ``tests/evaluation/test_spoilt_evaluations.py``.
"""

import json

import numpy as np
import pytest
from hostile_guard import one_line
from spoiling import places
from test_hostile_folders import READERS as FOLDERS

from memfree.folders.claim import claim
from memfree.models import load_model
from memfree.retrieval.index_folder import claim_index

REMOVED = object()
VALUES = [
    REMOVED,
    *(None, True, False, "x", "", [], [[1]], [None], {}, {"a": {"b": 1}}, -1, 0, -1.5, 1 << 70),
    *(1e308, 10**400, float("nan"), float("inf"), "\u202e\x1b[2J\0<b>", "\ud800", "word " * 2000),
]
CASES = 350
"""Of each kind of folder, chosen by a seed."""


def replace_index(folder):
    claim(folder, "index")
    with pytest.raises(ValueError, match="another dataset") as error:
        claim_index(folder, "h", {"name": "pixels"}, overwrite=False)
    one_line(error.value)


READERS = {**FOLDERS, "model": load_model, "index to replace": replace_index}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_every_value_of_a_manifest(copy, kind):
    folder = copy(kind.split()[0])
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    cases = [(keys, new) for keys in places(whole) for new in VALUES]
    chosen = np.random.default_rng(0).permutation(len(cases))[:CASES]
    refused = 0
    for number in chosen:
        keys, new = cases[number]
        value = json.loads(json.dumps(whole))
        inner = value
        for key in keys[:-1]:
            inner = inner[key]
        if new is REMOVED:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = new
        path.write_text(json.dumps(value))
        try:
            READERS[kind](folder)
        except (ValueError, OSError) as error:
            one_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{keys} {new!r}: {error!r}") from error
    assert 0 < refused < len(chosen)
