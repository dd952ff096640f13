"""Building an index: merging, grouping, multiplicities and conditions."""

import pyarrow as pa
import pytest
import torch

from memfree.data.duplicates import group, near_pairs
from memfree.images import to_bytes
from memfree.retrieval import ReferenceIndex


def random_images(count, shape=(1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator) * 2 - 1


def test_identical_images_become_one_row():
    images = random_images(10)
    index = ReferenceIndex.build(
        images[[0, 1, 2, 1, 3, 1, 0]],
        counts=torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        labels=torch.tensor([0, 1, 1, 2, 3, 1, 0]),
        captions=["a", "b", "c", "d", "e", "b", "z"],
        keys=list("pqrstuv"),
    )
    assert index.keys == ["p", "q", "r", "t"]
    assert index.multiplicity.tolist() == [8, 12, 3, 5]
    assert torch.equal(index.vectors, images[:4].flatten(1))
    assert index.label_counts.tolist() == [[8, 0, 0, 0], [0, 8, 4, 0], [0, 3, 0, 0], [0, 0, 0, 5]]
    assert index.labels.tolist() == [0, 1, 1, 3]
    assert index.captions == ["z", "b", "c", "e"]
    assert index.num_classes == 4
    assert index.group.tolist() == [0, 1, 2, 3]


def test_negative_zero_is_zero():
    images = torch.zeros(2, 1, 2, 2)
    images[1] = -0.0
    assert len(ReferenceIndex.build(images)) == 1


def test_declared_groups_count_together():
    index = ReferenceIndex.build(
        random_images(5), groups=["x", "y", "x", "z", "y"], counts=torch.tensor([1, 2, 3, 4, 5])
    )
    assert index.group.tolist() == [0, 1, 0, 2, 1]
    assert index.group_multiplicity.tolist() == [4, 7, 4, 4, 7]
    assert index.multiplicity.tolist() == [1, 2, 3, 4, 5]


def test_a_copy_joins_the_groups_it_was_declared_in():
    images = random_images(4)
    index = ReferenceIndex.build(images[[0, 1, 2, 0, 3]], groups=["x", "x", "y", "y", "z"])
    assert index.group.tolist() == [0, 0, 0, 1]
    assert index.group_multiplicity.tolist() == [4, 4, 4, 1]


def test_group_tensors_are_accepted():
    index = ReferenceIndex.build(random_images(3), groups=torch.tensor([7, 3, 7]))
    assert index.group.tolist() == [0, 1, 0]


def test_undeclared_near_copies_are_one_group():
    images = random_images(6, (3, 8, 8))
    near = images[2] + 0.02 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))
    images = torch.cat([images, near[None].clamp(-1, 1), images[:1] * 0.98])
    index = ReferenceIndex.build(images)
    assert index.group.tolist() == [0, 1, 2, 3, 4, 5, 2, 0]
    assert index.group_multiplicity.tolist() == [2, 1, 2, 1, 1, 1, 2, 2]
    # Declared groups are taken as they are declared.
    assert len(ReferenceIndex.build(images, groups=range(8)).group.unique()) == 8


def test_flat_images_are_not_near_copies():
    """Dark images with different faint content differ little, but much for what they show."""
    faint = 0.02 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.9
    assert len(ReferenceIndex.build(faint).group.unique()) == 4


def test_near_copies_are_those_of_a_prepared_dataset():
    generator = torch.Generator().manual_seed(4)
    base = random_images(20, (1, 8, 8), seed=5)
    noise = torch.linspace(0.01, 0.2, 20)[:, None, None, None]
    noisy = base + noise * torch.randn(base.shape, generator=generator)
    images = torch.cat([base, base.flip(-1), base.roll(1, -1), 0.7 * base, noisy.clamp(-1, 1)])
    groups = ReferenceIndex.build(images).group
    pairs = near_pairs(to_bytes(images).numpy())
    assert groups.tolist() == group(100, pairs).tolist()
    assert groups[20:80].tolist() == 3 * list(range(20))  # mirrored, shifted, brighter
    assert 20 < len(groups.unique()) < 40


def test_real_digits_are_all_their_own_group(digits):
    index = ReferenceIndex.build(digits[:600])
    assert len(index) == int(index.group.max()) + 1 == 600


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16 * 255
    return pixels.round() / 127.5 - 1


def test_images_come_back(digits):
    index = ReferenceIndex.build(digits[:20])
    assert torch.equal(index.images(torch.tensor([3, 0])), digits[[3, 0]])


def test_the_index_does_not_share_memory_with_the_images():
    images = random_images(4)
    before = images.flatten(1).clone()
    index = ReferenceIndex.build(images)
    images.zero_()
    assert torch.equal(index.vectors, before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"\(N, C, H, W\)"),
        (torch.zeros(0, 1, 4, 4), "not empty"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"u8/127\.5"),
        (torch.full((2, 1, 4, 4), 3.0), "span 3"),
        (torch.full((2, 1, 4, 4), float("nan")), "finite"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        ReferenceIndex.build(images)


def test_bad_arguments_are_refused():
    images = random_images(3)
    with pytest.raises(ValueError, match="labels has 2 entries, but there are 3 images"):
        ReferenceIndex.build(images, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="counts must be at least 1"):
        ReferenceIndex.build(images, counts=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="below 3"):
        ReferenceIndex.build(images, labels=torch.tensor([0, 1, 3]), num_classes=3)


class FakePart:
    """The crossing point of memfree.data, with near copies and two labels for one image."""

    keys = ["a", "b", "b-near", "c"]  # noqa: RUF012
    groups = ["ga", "gb", "gb", "gc"]  # noqa: RUF012
    copies = torch.tensor([1, 64, 3, 2])
    rows = torch.tensor([2, 0, 3, 5])
    conditions = pa.table(
        {
            "image_key": ["a", "b", "b", "b-near", "c", "held out"],
            "label": [0, 1, 2, 1, 0, 1],
            "count": [1, 60, 4, 3, 2, 1],
        }
    )

    def batches(self, batch_size):
        return iter(random_images(4).split(batch_size))


class FakeDataset:
    path = "somewhere"
    hash = "0123"
    num_classes = 3

    def part(self, name):
        assert name == "train"
        return FakePart()

    def part_records(self, name):
        shards = ["train-0", "train-1", "train-1", "train-1", "train-2"]
        return pa.table({"row": [0, 2, 3, 0, 5], "shard": shards})


def test_a_dataset_folder_brings_everything_along():
    done = []
    index = ReferenceIndex.build(FakeDataset(), batch_size=3, advance=done.append)
    assert index.keys == FakePart.keys
    assert index.group.tolist() == [0, 1, 1, 2]
    assert index.multiplicity.tolist() == [1, 64, 3, 2]
    assert index.group_multiplicity.tolist() == [1, 67, 67, 2]
    assert index.label_counts.tolist() == [[1, 0, 0], [0, 60, 4], [0, 3, 0], [2, 0, 0]]
    assert index.labels.tolist() == [0, 1, 1, 0]
    assert index.captions is None
    assert index.dataset_hash == "0123"
    assert index.items.shards == ["train-1", "train-0", "train-1", "train-2"]
    assert done == [3, 1]
    with pytest.raises(ValueError, match="has its own keys"):
        ReferenceIndex.build(FakeDataset(), keys=list("abcd"))


def test_an_unconditional_dataset_has_no_conditions():
    class Part(FakePart):
        conditions = FakePart.conditions.set_column(1, "label", pa.nulls(6, pa.int64()))

    class Dataset(FakeDataset):
        num_classes = None

        def part(self, name):
            return Part()

    index = ReferenceIndex.build(Dataset())
    assert (index.labels, index.label_counts, index.captions, index.num_classes) == (None,) * 4
    assert index.items.conditions.num_rows == 0
