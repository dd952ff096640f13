"""Search and copy-detection features on a GPU against the same on the CPU."""

import pytest
import torch
from compute_devices import DEVICES

from memfree.guidance import EmbeddingSimilarity
from memfree.retrieval import PixelFeatures, ReferenceIndex
from memfree.retrieval.features.copy_detection import (
    CopyDetectionFeatures,
    CopyDetectionNetwork,
    CopyDetectionShape,
)

SHAPE = CopyDetectionShape(size=16, widths=(8, 16), dimension=24)


def images_of(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def copy_detection():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CopyDetectionFeatures(SHAPE, CopyDetectionNetwork(SHAPE).state_dict())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [PixelFeatures, copy_detection])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("k", [1, 20])
def test_faiss_finds_what_the_exact_search_finds(device, make, grouped, k):
    faiss = pytest.importorskip("faiss")
    if device == "cuda" and faiss.get_num_gpus() == 0:
        pytest.skip("this FAISS sees no GPU: install faiss-gpu")
    references = images_of(3000)
    references[1000:1010] = references[:10] + 1e-4  # next to ties
    groups = [i // 3 for i in range(3000)] if grouped else list(range(3000))
    index = ReferenceIndex.build(references.clamp(-1, 1), make(), groups=groups)
    generator = torch.Generator().manual_seed(1)
    near = references[:40] + 0.05 * torch.randn(40, 3, 16, 16, generator=generator)
    queries = torch.cat([references[:20], near, images_of(40, 2)]).clamp(-1, 1)
    vectors = index.features(queries)
    index.backend = "torch"
    exact = index.search(vectors, k)
    # By hand, in float64, for the nearest member of any group.
    products = vectors.double() @ index.vectors.double().T
    gaps = torch.cdist(vectors.double(), index.vectors.double())
    scores = products if index.metric == "cosine" else gaps
    best = scores.amax(1) if index.metric == "cosine" else scores.amin(1)
    torch.testing.assert_close(exact.scores[:, 0].double(), best, atol=1e-5, rtol=1e-5)

    index.to(device).backend = "faiss"
    found = index.search(vectors, k)
    if device == "cuda":
        assert "Gpu" in type(index._faiss._index).__name__
    assert found.rows.device.type == device
    torch.testing.assert_close(found.scores.cpu(), exact.scores, atol=1e-4, rtol=1e-4)
    # Where scores are equal to rounding, rows may differ, but they are as near.
    theirs = scores.gather(1, found.rows.cpu())
    torch.testing.assert_close(theirs, exact.scores.double(), atol=1e-4, rtol=1e-4)
    assert (found.rows.cpu() == exact.rows).float().mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_embeddings_and_gradients_are_the_cpus(device):
    images, features = images_of(6), copy_detection()
    index = ReferenceIndex.build(images_of(80, 3), features, groups=range(80))

    def measured(where):
        index.to(where)
        given = images.to(where).requires_grad_()
        match = EmbeddingSimilarity()(index, given)
        (gradient,) = torch.autograd.grad(match.sigma.sum(), given)
        return [one.detach().cpu() for one in (features(given), match.sigma, match.rows, gradient)]

    expected = [one.double() for one in measured("cpu")]
    found = [one.double() for one in measured(device)]
    assert torch.equal(found[2], expected[2])
    for ours, theirs, tolerance in zip(found, expected, (1e-2, 1e-2, 0, 5e-2), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()  # TF32 convolutions
