"""Pipelines and an index that the tests of a file share."""

import pytest
import tiny_pipelines
from guard_parts import FAMILIES, make_index


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def pipes():
    return {name: getattr(tiny_pipelines, name)() for name in FAMILIES}


@pytest.fixture(scope="module")
def index():
    return make_index()
