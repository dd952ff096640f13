"""Exact nearest-neighbour search, with torch or FAISS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memfree.full_precision import full_precision
from memfree.retrieval.features.base import Metric

# Approximate scores held at a time, in elements: 128 MB of float32, or this share of the vectors.
_SCORES = 1 << 25
_SCORES_SHARE = 16
MARGIN = 32
"""Candidates beyond k, for rounding and for several members of a group."""
_PART = 1 << 23  # elements of a temporary of reference vectors: 32 MB of float32
_CACHED = 1 << 20  # the same for a reused buffer: 4 MB
_MOST = 2048  # most neighbours that FAISS returns on a GPU


@dataclass
class Hits:
    """Nearest references of B queries, best first: (B, k) int64 rows of the index, and (B, k)
    float32 scores, L2 distances or cosine similarities."""

    rows: Tensor
    scores: Tensor


@dataclass
class Groups:
    """Which rows belong together."""

    group: Tensor
    """(N,) int64 group number of every row, 0 to count − 1, all used."""
    count: int
    first: Tensor
    """(count,) int64, one row of every group."""
    others: Tensor
    """(N − count,) int64, all other rows."""

    @classmethod
    def of(cls, group: Tensor) -> Groups:
        """Find one row of each group, and the others, from (N,) int64 group numbers."""
        count = int(group.max()) + 1
        rows = torch.arange(len(group), device=group.device)
        first = torch.full((count,), len(group), dtype=torch.int64, device=group.device)
        first.scatter_reduce_(0, group, rows, "amin")
        others = rows[first[group] != rows]
        return cls(group, count, first, others)

    @property
    def singletons(self) -> bool:
        """Whether every row is its own group."""
        return len(self.others) == 0


class References:
    """Reference vectors (N, D) float32 prepared for search; for ``cosine`` of length 1.

    Distances take two passes. The expanded square ‖r‖² − 2 q·r of *centred* vectors is one matrix
    product, but loses digits near a reference. So it only selects all rows whose approximate score
    lies within twice its error bound of the k-th best group's, which loses no true neighbour; their
    scores are then computed from differences. Without ``keep_centred`` exhaustive searches centre
    the vectors part by part, unless ``centred`` was used.
    """

    def __init__(
        self, vectors: Tensor, groups: Groups, metric: Metric, keep_centred: bool = True
    ) -> None:
        self.vectors = vectors
        self.groups = groups
        self.metric = metric
        self.keep_centred = keep_centred
        self.centre = _mean(vectors) if metric == "l2" else vectors.new_zeros(vectors.shape[1])
        self._centred: Tensor | None = None
        self.squared_norms = torch.cat([part.square().sum(1) for part in self.centred_parts()])

    @property
    def centred(self) -> Tensor:
        """The vectors minus their mean (N, D); the vectors themselves for ``cosine``."""
        if self.metric == "cosine":
            return self.vectors
        if self._centred is None:
            self._centred = self.vectors - self.centre
        return self._centred

    @property
    def _has_centred(self) -> bool:
        return self.metric == "cosine" or self.keep_centred or self._centred is not None

    def centred_parts(self) -> Iterator[Tensor]:
        """Centred vectors in parts of bounded size; each may overwrite the one before."""
        if self._has_centred:
            yield from self.centred.split(_rows(self.vectors))
            return
        # A reused buffer of a CPU's cache size takes a third of the time of new temporaries.
        rows = max(1, _CACHED // max(1, self.vectors.shape[1]))
        buffer = torch.empty_like(self.vectors[:rows])
        for part in self.vectors.split(rows):
            if torch.is_grad_enabled():  # autograd keeps operands
                yield part - self.centre
            else:
                yield torch.sub(part, self.centre, out=buffer[: len(part)])

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        """Nearest members of the k nearest distinct groups; see ``ReferenceIndex.search``."""
        most = max(_SCORES, self.vectors.numel() // _SCORES_SHARE)
        size = max(1, most // len(self.vectors))
        parts = [self._search(part, k) for part in queries.split(size)]
        return Hits(torch.cat([p.rows for p in parts]), torch.cat([p.scores for p in parts]))

    def _search(self, queries: Tensor, k: int) -> Hits:
        if queries.device.type == "cpu":
            check_finite(queries)
            return self._exhaustive(queries, self._costs(queries), k)
        costs = self._costs(queries)
        hits, certain = self._leading(queries, costs, k)
        if bool(certain.all()):
            return hits
        check_finite(queries)
        return self._exhaustive(queries, costs, k)

    def _leading(self, queries: Tensor, costs: Tensor, k: int) -> tuple[Hits, Tensor]:
        # Sizes do not depend on the data, so that an accelerator need not wait for the host.
        size = len(self.vectors)
        wanted = min(size, candidates(k, self.groups))
        lowest, rows = costs.topk(wanted, dim=1, largest=False)
        limit = kth_group(lowest, rows, k, self.groups) + 2 * self.error(queries)
        certain = (
            (limit < lowest[:, -1:]).squeeze(1) if wanted < size else limit.squeeze(1) < torch.inf
        )
        certain = certain & queries.isfinite().all(dim=1)
        # From here on ties go to the lower row, as both sorts are stable.
        rows = rows.sort(dim=1).values
        query = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        scores = self.exact_scores(queries, query.flatten(), rows.flatten()).view_as(rows)
        order = scores.argsort(dim=1, stable=True, descending=self.metric == "cosine")
        if not self.groups.singletons:
            first = first_of_group(self.groups.group[rows.gather(1, order)])
            order = order.gather(1, (~first).to(torch.uint8).argsort(dim=1, stable=True))
        order = order[:, :k]
        return Hits(rows.gather(1, order), scores.gather(1, order)), certain

    def _exhaustive(self, queries: Tensor, costs: Tensor, k: int) -> Hits:
        error = self.error(queries)
        best = costs if self.groups.singletons else self._best_of_group(costs)
        limit = best.topk(k, dim=1, largest=False).values[:, -1:] + 2 * error
        query, row = torch.nonzero(costs <= limit, as_tuple=True)
        if not self.groups.singletons:
            # Only members that may be a group's nearest continue to the second pass.
            near = best[query, self.groups.group[row]] + 2 * error[query, 0]
            keep = costs[query, row] <= near
            query, row = query[keep], row[keep]
        return self.select(queries, query, row, k)

    def _costs(self, queries: Tensor) -> Tensor:
        """Approximate costs (B, N), lower is nearer: ‖r‖² − 2 q·r (centred), or −q·r."""
        if self.metric == "cosine":
            return self.products(queries).neg_()
        return self.products(queries - self.centre).mul_(-2).add_(self.squared_norms)

    def products(self, queries: Tensor) -> Tensor:
        """Inner products (B, N) of queries (B, D) with the centred references."""
        # With references on the left and in parts a CPU takes half the time of ``queries @
        # centred.T`` where queries are few (docs/results.md, "What it costs").
        with full_precision(queries.device):
            if queries.device.type != "cpu" and self._has_centred:
                return queries @ self.centred.T
            products = queries.new_empty(len(queries), len(self.vectors))
            start = 0
            for part in self.centred_parts():
                products[:, start : start + len(part)] = (part @ queries.T).T
                start += len(part)
        return products

    def centred_rows(self, rows: Tensor) -> Tensor:
        """Centred vectors of rows, (*rows.shape, D), without a centred copy of all."""
        if self._has_centred:
            return self.centred[rows]
        return self.vectors[rows] - self.centre

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``weights @ centred``, (B, N) → (B, D)."""
        with full_precision(weights.device):
            if self._has_centred:
                return weights @ self.centred
            total = weights.new_zeros(len(weights), self.vectors.shape[1])
            start = 0
            for part in self.centred_parts():
                total.addmm_(weights[:, start : start + len(part)], part)
                start += len(part)
            return total

    def error(self, queries: Tensor) -> Tensor:
        """Bound (B, 1) on approximate costs' rounding error: u·√D·‖q‖·‖r‖ of a D-term product
        (Higham and Mary, 2019) times a generous constant, with u float32's rounding unit."""
        factor = 8 * 2.0**-24 * (self.vectors.shape[1] ** 0.5 + 1)
        if self.metric == "cosine":
            return queries.new_full((len(queries), 1), factor)
        query = torch.linalg.vector_norm(queries - self.centre, dim=1, keepdim=True)
        reference = self.squared_norms.max().sqrt()
        return factor * reference * (2 * query + reference)

    def _best_of_group(self, costs: Tensor) -> Tensor:
        groups = self.groups
        best = costs[:, groups.first]
        index = groups.group[groups.others].expand(len(costs), -1)
        return best.scatter_reduce_(1, index, costs[:, groups.others], "amin")

    def exact_scores(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Scores (P,) of pairs of query and reference, from their differences."""
        scores = queries.new_empty(len(query))
        for part in torch.arange(len(query), device=query.device).split(_rows(self.vectors)):
            vectors, q = self.vectors[row[part]], queries[query[part]]
            if self.metric == "l2":
                scores[part] = torch.linalg.vector_norm(vectors.sub_(q), dim=1)
            else:
                scores[part] = vectors.mul_(q).sum(1)
        return scores

    def select(self, queries: Tensor, query: Tensor, row: Tensor, k: int) -> Hits:
        """Score candidates of at least k groups a query exactly; keep the k best groups' best."""
        order = row.argsort(stable=True)
        query, row = query[order], row[order]
        scores = self.exact_scores(queries, query, row)
        order = scores.argsort(stable=True, descending=self.metric == "cosine")
        if not self.groups.singletons:
            # Sorted by (query, group, score), the first of each run is the group's nearest.
            pair = query * self.groups.count + self.groups.group[row]
            by_pair = order[pair[order].argsort(stable=True)]
            run = pair[by_pair]
            nearest = torch.ones_like(run, dtype=torch.bool)
            nearest[1:] = run[1:] != run[:-1]
            keep = torch.zeros_like(nearest)
            keep[by_pair[nearest]] = True
            order = order[keep[order]]
        order = order[query[order].argsort(stable=True)]
        kept = torch.bincount(query[order], minlength=len(queries))
        start = kept.cumsum(0) - kept
        chosen = order[start[:, None] + torch.arange(k, device=start.device)]
        return Hits(row[chosen], scores[chosen])


def candidates(k: int, groups: Groups) -> int:
    """Number of lowest-cost rows that usually hold the k nearest groups."""
    return (k if groups.singletons else 2 * k) + MARGIN


def first_of_group(group: Tensor) -> Tensor:
    """First occurrence of each number in its row of ``group`` (B, n), as (B, n) bool."""
    order = group.argsort(dim=1, stable=True)
    ordered = group.gather(1, order)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter_(1, order, new)


def kth_group(costs: Tensor, rows: Tensor, k: int, groups: Groups) -> Tensor:
    """Cost (B, 1) of the k-th distinct group, of ascending costs (B, n); infinite without one."""
    if groups.singletons:
        return costs[:, k - 1 : k]
    first = first_of_group(groups.group[rows])
    reached = (first.cumsum(1) == k) & first
    return torch.where(reached, costs, torch.inf).amin(1, keepdim=True)


def check_finite(queries: Tensor) -> None:
    """Refuse NaN and infinite values."""
    if not bool(queries.isfinite().all()):
        raise ValueError("queries hold NaN or infinite values")


def _rows(vectors: Tensor) -> int:
    return max(1, _PART // max(1, vectors.shape[1]))


def _mean(vectors: Tensor) -> Tensor:
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for part in vectors.split(_rows(vectors)):
        total += part.sum(0, dtype=torch.float64)
    return (total / len(vectors)).to(torch.float32)


class FaissReferences:
    """FAISS search, on a GPU if there is one, with the results of ``References``: approximate
    candidates are scored exactly, and queries whose candidates may miss neighbours (very large
    groups, many ties) are searched exhaustively. FAISS keeps a centred copy of the vectors."""

    def __init__(self, references: References):
        self.references = references
        dimension = references.vectors.shape[1]
        flat = faiss.IndexFlatIP if references.metric == "cosine" else faiss.IndexFlatL2
        self._index: Any = flat(dimension)
        if faiss.get_num_gpus() > 0:
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, 0, self._index)
        for part in references.centred_parts():
            self._index.add(np.ascontiguousarray(part.cpu().numpy()))

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        """Nearest members of the k nearest distinct groups; see ``ReferenceIndex.search``."""
        refs = self.references
        check_finite(queries)
        size = len(refs.vectors)
        wanted = min(size, candidates(k, refs.groups), _MOST)
        if wanted < k:
            return refs.search(queries, k)
        costs, rows, error = self._candidates(queries, wanted)
        limit = kth_group(costs, rows, k, refs.groups) + 2 * error
        certain = (limit < costs[:, -1:]).squeeze(1) | (wanted == size)
        # Drop columns beyond the limit, and all of uncertain queries.
        keep = (costs <= limit) & certain[:, None]
        query, column = torch.nonzero(keep[certain], as_tuple=True)
        result = Hits(rows.new_empty(len(queries), k), costs.new_empty(len(queries), k))
        if bool(certain.any()):
            hits = refs.select(queries[certain], query, rows[certain][query, column], k)
            result.rows[certain], result.scores[certain] = hits.rows, hits.scores
        if not bool(certain.all()):
            hits = refs.search(queries[~certain], k)
            result.rows[~certain], result.scores[~certain] = hits.rows, hits.scores
        return result

    def _candidates(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        refs = self.references
        centred = queries - refs.centre
        scores, rows = self._index.search(np.ascontiguousarray(centred.cpu().numpy()), wanted)
        costs = torch.from_numpy(scores).to(queries.device)
        rows = torch.from_numpy(rows).to(queries.device)
        if refs.metric == "cosine":
            return -costs, rows, refs.error(queries)
        square = centred.square().sum(1, keepdim=True)
        # FAISS also rounds the query's own square.
        return costs - square, rows, refs.error(queries) + 2.0**-20 * square
