"""Images, an extractor and a comparison for tests of what changes an index."""

import torch

from memfree.retrieval import Features


class Averages(Features):
    """A tiny extractor that images cannot be had back from."""

    metric = "cosine"

    def forward(self, images):
        rows, columns = images.float().mean(dim=3), images.float().mean(dim=2)
        vectors = torch.cat([rows, columns], dim=2).flatten(1)
        return torch.nn.functional.normalize(vectors, dim=1)

    def describe(self):
        return {"name": "averages", "metric": "cosine"}


def images_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1


def near(images, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def same(first, second):
    """All that an index says of its rows, but for default keys."""
    assert torch.allclose(first.vectors, second.vectors, atol=1e-6)
    assert torch.equal(first.group, second.group)
    assert torch.equal(first.multiplicity, second.multiplicity)
    assert torch.equal(first.group_multiplicity, second.group_multiplicity)
    assert first.items.contents == second.items.contents
    columns = ("row", "image_key", "label", "caption", "count")
    tables = [
        sorted(zip(*(index.items.conditions[c].to_pylist() for c in columns), strict=True))
        for index in (first, second)
    ]
    assert tables[0] == tables[1]
    queries = images_of(5, seed=9)
    assert torch.equal(first.search(queries, 3).rows, second.search(queries, 3).rows)


def a_batch():
    """14 images: some identical, some near copies, captioned, labelled and counted."""
    distinct = images_of(10)
    images = torch.cat([distinct, distinct[[2, 7]], near(distinct[[3, 8]])])
    return {
        "images": images,
        "captions": [f"caption {i % 5}" for i in range(14)],
        "labels": torch.arange(14) % 3,
        "counts": torch.arange(1, 15),
        "keys": [f"key {i}" for i in range(14)],
    }


def part(batch, start, stop):
    return {name: value[start:stop] for name, value in batch.items()}
