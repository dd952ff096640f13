"""The caption of what is copied: the nearest image's, or the most common."""

import numpy as np
import pytest
import torch
from changed_indexes import images_of

from memfree.retrieval import ReferenceIndex


def test_the_duplicated_caption_is_the_most_common_of_more_than_m():
    images = images_of(6)
    index = ReferenceIndex.build(
        torch.cat([images, images[1:3]]),
        captions=["near", "a", "b", "b", "c", "c", "a", "x"],
        counts=torch.tensor([1, 3, 1, 2, 1, 3, 1, 5]),
        groups=[0, 1, 2, 3, 4, 5, 1, 2],
    )
    # Records: a 3 + 1, b 1 + 2, c 1 + 3, x 5.
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 4], [0, 4, 5, 1], [0, 1, 4, 5]])

    def found(m, policy="most_common"):
        return index.duplicated_caption(rows, policy, m)

    assert found(0) == ["x", "a", "c", "a"]  # of equals, the nearer image's
    assert found(3) == ["x", "a", "c", "a"]
    assert found(4) == ["x", "near", "near", "near"]
    assert found(5) == ["near"] * 4
    assert found(0, "nearest") == ["near"] * 4
    assert index.duplicated_caption(rows[:, 1:]) == ["a", "a", "c", "a"]


def test_near_copies_of_a_neighbour_count_too():
    index = ReferenceIndex.build(
        images_of(4),
        captions=["a", "b", "c", "c"],
        counts=torch.tensor([2, 1, 1, 4]),
        groups=["x", "y", "y", "y"],
    )
    assert index.duplicated_caption(torch.tensor([[0, 1]]), "most_common", m=4) == ["c"]
    assert index.duplicated_caption(torch.tensor([[0]]), "most_common", m=1) == ["a"]


def test_captions_are_brute_force():
    generator = np.random.default_rng(0)
    count = 60
    captions = [f"c{i}" for i in generator.integers(0, 8, count)]
    copies = torch.from_numpy(generator.integers(1, 6, count))
    images = images_of(40)[generator.integers(0, 40, count)]
    index = ReferenceIndex.build(images, captions=captions, counts=copies, groups=range(count))
    rows = index.search(images_of(20, 3), 12).rows
    contents = {}
    for i in range(count):
        contents.setdefault(images[i].numpy().tobytes(), []).append(i)
    members = list(contents.values())
    for m in (0, 9, 12, 15, 20):
        for found, neighbours in zip(
            index.duplicated_caption(rows, "most_common", m), rows.tolist(), strict=True
        ):
            totals = {}
            for group in dict.fromkeys(index.group[neighbours].tolist()):
                for row in torch.nonzero(index.group == group).flatten().tolist():
                    for i in members[row]:
                        totals[captions[i]] = totals.get(captions[i], 0) + int(copies[i])
            most = max(totals.values())
            if most > m:
                assert totals[found] == most
            else:
                assert found == index.captions[neighbours[0]]


def test_captions_that_are_not_there():
    index = ReferenceIndex.build(images_of(3))
    rows = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="no captions"):
        index.duplicated_caption(rows)
    captioned = index.add(images_of(1, 3), captions=["late"], groups=[index.keys[0]])
    # An image without a caption gives that of its near copies, or none.
    assert captioned.duplicated_caption(torch.tensor([[0, 1], [1, 0]])) == ["late", ""]
    with pytest.raises(ValueError, match=r"\(B, k\)"):
        captioned.duplicated_caption(torch.tensor([0]))
    with pytest.raises(ValueError, match="m is -1"):
        captioned.duplicated_caption(rows, m=-1)


def test_nearest_captions_count_nothing_and_counts_are_made_once():
    index = ReferenceIndex.build(images_of(6), captions=list("abcabc"), groups=range(6))
    rows = torch.tensor([[0, 1], [5, 0]])
    assert index.duplicated_caption(rows) == ["a", "c"]
    assert "caption_counts" not in vars(index.items)
    assert index.duplicated_caption(torch.tensor([[0, 1, 3]]), "most_common", m=1) == ["a"]
    made = index.items.caption_counts
    index.duplicated_caption(torch.tensor([[0, 1, 3]]), "most_common", m=1)
    assert index.items.caption_counts is made


def test_changed_indexes_count_their_own_captions():
    index = ReferenceIndex.build(images_of(4), captions=list("abca"), groups=range(4))

    def found(of, rows):
        return of.duplicated_caption(torch.tensor([rows]), "most_common", m=1)

    assert found(index, [1, 0, 3]) == ["a"]
    more = index.add(images_of(4)[[1, 1]], captions=["b", "b"], groups=[0, 1])
    assert found(more, [0, 1, 3]) == ["b"]
    fewer = index.remove([index.keys[3]])
    assert found(fewer, [1, 0]) == ["b"]
    assert found(index, [1, 0, 3]) == ["a"]
