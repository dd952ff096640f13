"""Parts of a command's work: what --part says, and that parts are disjoint and complete."""

import pytest

from memfree.folders.lock import WHOLE, Part, part_of


def test_the_third_of_eight():
    assert part_of("3/8") == Part(3, 8)
    assert Part(3, 8).share(range(24)) == range(2, 24, 8)
    assert Part(3, 8).share(["a", "b"]) == []


@pytest.mark.parametrize("of", [2, 3, 8, 200])
def test_parts_are_disjoint_and_complete(of):
    items = list(range(50))
    taken = [part_of(f"{number}/{of}").share(items) for number in range(1, of + 1)]
    assert sorted(sum(taken, [])) == items


def test_all_and_the_only_part_are_the_whole():
    assert part_of("all") == part_of("1/1") == WHOLE
    assert WHOLE.whole and str(WHOLE) == "all" and str(Part(3, 8)) == "3/8"
    assert WHOLE.share([1, 2]) == [1, 2]


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "3", "a/3", "-1/3", "1/0", "", "1/3/5", "none"])
def test_anything_else_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"--part {wrong}: pass all, or a part such as 3/8"):
        part_of(wrong)
