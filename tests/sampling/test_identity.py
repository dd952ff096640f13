"""An index is another one where anything differs that guidance or the trace makes use of."""

import pytest
import torch

from memfree.retrieval import ReferenceIndex
from memfree.sampling.checks import vectors_hash

IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def built(counts=(6, 4, 1), captions=("cat", "dog", "cat"), **changed):
    """Records of two images: the first is there twice, under a caption each time."""
    images = IMAGES[[0, 0, 1]]
    given = {"groups": [0, 0, 1], "keys": ["a", "a", "b"], **changed}
    return ReferenceIndex.build(
        images, counts=torch.tensor(counts), captions=list(captions), **given
    )


def test_the_same_index_is_the_same():
    assert vectors_hash(built()) == vectors_hash(built())


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": (7, 3, 1)},  # the same multiplicity, and the same most frequent caption
        {"counts": (7, 4, 1)},
        {"captions": ("cat", "cow", "cat")},
        {"keys": ["a", "a", "c"]},
        {"groups": [0, 0, 0]},
        {"labels": torch.tensor([0, 1, 0])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_index_is_another(changed):
    assert vectors_hash(built(**changed)) != vectors_hash(built())
