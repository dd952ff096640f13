"""Search against brute force in float64: distances, cosines, groups, ties, tiny distances."""

import numpy as np
import pytest
import torch

from memfree.retrieval import Hits, ReferenceIndex
from memfree.retrieval import index as index_module
from memfree.retrieval import search as search_module
from memfree.retrieval.search import FaissReferences, Groups, References


def brute_force(vectors, group, queries, k, metric):
    """Rows and scores (B, k) by float64 differences and one Python loop a query."""
    r, q = vectors.double().numpy(), queries.double().numpy()
    if metric == "l2":
        scores = np.sqrt(((q[:, None] - r[None]) ** 2).sum(-1))
        order = np.argsort(scores, axis=1, kind="stable")
    else:
        scores = (q[:, None] * r[None]).sum(-1)
        order = np.argsort(-scores, axis=1, kind="stable")
    rows = np.empty((len(q), k), dtype=np.int64)
    for b in range(len(q)):
        seen, chosen = set(), []
        for row in order[b]:
            if int(group[row]) not in seen:
                seen.add(int(group[row]))
                chosen.append(row)
        rows[b] = chosen[:k]
    return torch.from_numpy(rows), torch.from_numpy(np.take_along_axis(scores, rows, 1))


def assert_same(found: Hits, rows, scores, vectors, metric, tolerance=3e-6):
    """Scores equal to float32; rows equal except where scores tie within rounding."""
    scale = max(1.0, float(scores.abs().max())) if metric == "cosine" else scores
    assert ((found.scores - scores).abs() <= tolerance * scale + 1e-7).all()
    differ = found.rows != rows
    gaps = (found.scores.double() - scores).abs()
    assert (gaps[differ] <= 1e-6 * scores[differ].abs() + 1e-7).all()
    for row in found.rows:
        assert len(row.unique()) == len(row)


def case(name, metric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "plain":
        vectors = torch.randn(700, 48, generator=generator)
        group = torch.arange(700)
    elif name == "offset":  # a large common offset, which the expanded square would drown in
        vectors = 30 + 0.1 * torch.randn(700, 48, generator=generator)
        group = torch.arange(700)
    elif name == "groups":
        vectors = torch.randn(700, 48, generator=generator)
        group = torch.randint(60, (700,), generator=generator)
        group = torch.unique(group, return_inverse=True)[1]
    elif name == "one large group":
        vectors = torch.randn(700, 48, generator=generator)
        vectors[:640] *= 0.1
        group = torch.cat([torch.zeros(640), torch.arange(1, 61)]).long()
    else:  # near copies at distances around the rounding of the expanded square
        base = torch.randn(70, 48, generator=generator)
        steps = torch.logspace(-7, -2, 10)[:, None, None]
        vectors = (base + steps * torch.randn(10, 70, 48, generator=generator)).flatten(0, 1)
        group = torch.arange(70).repeat(10) if name == "near groups" else torch.arange(700)
    queries = torch.cat(
        [
            vectors[::50],  # distance exactly 0
            vectors[5::50] + 1e-6,
            vectors.mean(0) + torch.randn(20, 48, generator=generator),
            vectors.mean(0) + 100 * torch.randn(4, 48, generator=generator),
        ]
    )
    if metric == "cosine":
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        queries = torch.nn.functional.normalize(queries, dim=1)
    return vectors, group, queries


CASES = ["plain", "offset", "groups", "one large group", "near", "near groups"]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 20])
def test_torch_search_is_brute_force(name, metric, k):
    vectors, group, queries = case(name, metric)
    rows, scores = brute_force(vectors, group, queries, k, metric)
    found = References(vectors, Groups.of(group), metric).search(queries, k)
    assert_same(found, rows, scores, vectors, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", CASES)
def test_all_groups_can_be_asked_for(name, metric):
    vectors, group, queries = case(name, metric)
    k = int(group.max()) + 1
    rows, scores = brute_force(vectors, group, queries, k, metric)
    found = References(vectors, Groups.of(group), metric).search(queries, k)
    assert_same(found, rows, scores, vectors, metric)
    assert (group[found.rows].sort(1).values == torch.arange(k)).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 20])
def test_faiss_finds_the_same(name, metric, k):
    vectors, group, queries = case(name, metric)
    references = References(vectors, Groups.of(group), metric, keep_centred=False)
    found = FaissReferences(references).search(queries, k)
    other = References(vectors, Groups.of(group), metric).search(queries, k)
    assert torch.equal(found.rows, other.rows)
    assert torch.equal(found.scores, other.scores)


def test_ties_go_to_the_lower_row():
    vectors = torch.tensor([[3.0, 0], [0, 1], [1, 0], [0, -1], [-1, 0], [5, 5]])
    found = References(vectors, Groups.of(torch.arange(6)), "l2").search(torch.zeros(1, 2), 5)
    assert found.rows.tolist() == [[1, 2, 3, 4, 0]]
    assert found.scores.tolist() == [[1, 1, 1, 1, 3]]


def test_ties_within_a_group_go_to_the_lower_row():
    vectors = torch.tensor([[0.0, 1], [1, 0], [0, -1], [3, 0]])
    group = torch.tensor([1, 0, 0, 1])
    found = References(vectors, Groups.of(group), "l2").search(torch.zeros(1, 2), 2)
    assert found.rows.tolist() == [[0, 1]]


def test_small_memory_bounds_change_nothing(monkeypatch):
    vectors, group, queries = case("near groups", "l2")
    whole = References(vectors, Groups.of(group), "l2").search(queries, 20)
    monkeypatch.setattr(search_module, "_SCORES", 3 * 700)
    monkeypatch.setattr(search_module, "_PART", 7 * 48)
    monkeypatch.setattr(search_module, "_CACHED", 5 * 48)
    for keep_centred in (True, False):
        parts = References(vectors, Groups.of(group), "l2", keep_centred).search(queries, 20)
        assert torch.equal(whole.rows, parts.rows)
        assert torch.equal(whole.scores, parts.scores)


def test_error_bound_holds():
    """The certificate rests on it: approximate costs are within the bound of float64 ones."""
    for name in CASES:
        for metric in ("l2", "cosine"):
            vectors, group, queries = case(name, metric)
            references = References(vectors, Groups.of(group), metric)
            r, q = vectors.double(), queries.double()
            if metric == "l2":
                # Both costs leave out the query's own square.
                centred = q - references.centre.double()
                exact = torch.cdist(q, r, compute_mode="donot_use_mm_for_euclid_dist").square()
                exact -= centred.square().sum(1, keepdim=True)
            else:
                exact = -(q @ r.T)
            gap = (references._costs(queries).double() - exact).abs()
            assert (gap <= references.error(queries)).all()


def random_index(**kwargs):
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, ReferenceIndex.build(images, **kwargs)


def test_index_searches_images_and_vectors_alike():
    images, index = random_index()
    by_image, by_vector = index.search(images[:7], 3), index.search(images[:7].flatten(1), 3)
    assert torch.equal(by_image.rows, by_vector.rows)
    assert by_image.rows[:, 0].tolist() == list(range(7))
    assert (by_image.scores[:, 0] == 0).all()


def test_search_has_no_gradient():
    images, index = random_index()
    queries = images[:3].clone().requires_grad_()
    assert not index.search(queries, 3).scores.requires_grad


@pytest.mark.parametrize("k", [0, 41])
def test_impossible_k_is_one_clear_line(k):
    _, index = random_index()
    with pytest.raises(ValueError, match=f"k={k} neighbours.* 40 distinct groups") as error:
        index.search(torch.zeros(1, 16), k)
    assert "\n" not in str(error.value)


def test_wrong_queries_are_refused():
    _, index = random_index()
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\)"):
        index.search(torch.zeros(2, 1, 8, 8), 1)
    with pytest.raises(ValueError, match=r"vectors \(B, 16\)"):
        index.search(torch.zeros(2, 5), 1)
    with pytest.raises(ValueError, match="NaN"):
        index.search(torch.full((2, 16), float("nan")), 1)


def test_backends_of_an_index_agree():
    _, index = random_index(groups=[i % 13 for i in range(40)])
    queries = torch.randn(9, 16)
    expected = index.search(queries, 5)
    _, other = random_index(groups=[i % 13 for i in range(40)])
    other.backend = "faiss"
    found = other.search(queries, 5)
    assert other._faiss is not None
    assert torch.equal(expected.rows, found.rows)
    assert torch.equal(expected.scores, found.scores)


def test_far_queries_keep_few_candidates(monkeypatch):
    """An unclamped clean estimate at high noise is far away; its search must not score all rows."""
    vectors = torch.randn(5000, 48, generator=torch.Generator().manual_seed(0))
    references = References(vectors, Groups.of(torch.arange(5000)), "l2")
    scored = []
    select = references.select
    monkeypatch.setattr(
        references,
        "select",
        lambda q, query, row, k: scored.append(len(row)) or select(q, query, row, k),
    )
    for scale in (1, 1e3, 1e6):
        references.search(scale * vectors[:10], 20)
    assert max(scored) < 10 * 30


def set_precision(setting):
    """One of the ways in which a process asks for fast float32 products."""
    if setting in ("high", "medium"):
        torch.set_float32_matmul_precision(setting)
    elif setting == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif setting == "everywhere":
        torch.backends.fp32_precision = "tf32"
    else:
        torch.backends.mkldnn.matmul.fp32_precision = setting


def precisions():
    backends = torch.backends
    settings = (backends, backends.cuda.matmul, backends.mkldnn.matmul)
    return [setting.fp32_precision for setting in settings]


@pytest.fixture
def restored_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "setting", ["high", "medium", "bf16", "tf32", "allow_tf32", "everywhere", "autocast"]
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_fast_products_leave_bits_and_candidates(setting, metric, restored_precision, monkeypatch):
    """With the error bound of rounded products, nearly all rows would be scored exactly."""
    vectors, group, queries = case("plain", metric)
    scored, select = [], References.select

    def counted(self, queries, query, row, k):
        scored.append(len(row))
        return select(self, queries, query, row, k)

    monkeypatch.setattr(References, "select", counted)
    references = References(vectors, Groups.of(group), metric)
    expected = references.products(queries), references.weighted_sum(queries @ vectors.T)
    weights, hits = queries @ vectors.T, references.search(queries, 5)
    if setting != "autocast":
        set_precision(setting)
    before = precisions()
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        found = references.search(queries, 5)
        assert torch.equal(references.products(queries), expected[0])
        assert torch.equal(references.weighted_sum(weights), expected[1])
    assert torch.equal(found.rows, hits.rows) and torch.equal(found.scores, hits.scores)
    assert scored[0] == scored[1]
    assert precisions() == before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 20])
def test_the_search_that_does_not_wait_finds_the_same(name, metric, k):
    """What an accelerator runs; where it is not certain, it says so."""
    vectors, group, queries = case(name, metric)
    references = References(vectors, Groups.of(group), metric)
    expected = references.search(queries, k)
    found, certain = references._leading(queries, references._costs(queries), k)
    assert certain.any() or name == "one large group" or name.startswith("near")
    assert torch.equal(found.rows[certain], expected.rows[certain])
    assert torch.equal(found.scores[certain], expected.scores[certain])
    bad = torch.full_like(queries[:1], float("nan"))
    assert not references._leading(bad, references._costs(bad), k)[1].any()


def test_large_sets_are_searched_by_torch_without_a_second_copy(monkeypatch):
    _, index = random_index(groups=[i % 13 for i in range(40)])
    expected = index.search(torch.zeros(2, 16), 5)
    monkeypatch.setattr(index_module, "_SMALL", 1)
    _, large = random_index(groups=[i % 13 for i in range(40)])
    found = large.search(torch.zeros(2, 16), 5)
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.scores, expected.scores)
    assert large._faiss is None and large.references._centred is None


def test_products_of_parts_have_a_gradient(monkeypatch):
    monkeypatch.setattr(search_module, "_CACHED", 48)  # a row at a time
    vectors, group, queries = case("plain", "l2")
    queries = queries.clone().requires_grad_()
    gradients = []
    for keep in (True, False):
        references = References(vectors, Groups.of(group), "l2", keep_centred=keep)
        (gradient,) = torch.autograd.grad(references.products(queries).square().sum(), queries)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
