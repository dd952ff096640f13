"""Names that moved are found where they were, with a warning, for one release."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("package", "name", "now"),
    [
        ("memfree.data", "prepare", "memfree.commands.prepare"),
        ("memfree.models", "SampleGrid", "memfree.training"),
        ("memfree.evaluation", "audit", "memfree.commands.audit"),
        ("memfree.study", "text_study", "memfree.commands.study"),
        ("memfree.slurm", "Submission", "memfree.commands.submit"),
    ],
)
def test_a_name_that_moved(package, name, now):
    module = importlib.import_module(package)
    with pytest.warns(FutureWarning, match=f"{package}.{name} has moved: import it from {now}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(now), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
