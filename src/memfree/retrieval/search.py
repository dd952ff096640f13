"""Exact nearest-neighbour search over distinct groups of reference vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memfree.retrieval.features import Metric

# Approximate scores held at a time, in elements: 128 MB of float32.
_SCORES = 1 << 25
# Elements of a temporary of reference vectors: 32 MB of float32.
_PART = 1 << 23


@dataclass
class Hits:
    """Nearest references of B queries, best first.

    Attributes:
        rows: (B, k) int64 rows of the index.
        scores: (B, k) float32: L2 distances, or cosine similarities.
    """

    rows: Tensor
    scores: Tensor


@dataclass
class Groups:
    """Which rows belong together.

    Attributes:
        group: (N,) int64 group number of every row, 0 to count − 1, all of them used.
        count: number of groups.
        first: (count,) int64, one row of every group.
        others: (N − count,) int64, all other rows.
    """

    group: Tensor
    count: int
    first: Tensor
    others: Tensor

    @classmethod
    def of(cls, group: Tensor) -> Groups:
        """Sort out the rows of a (N,) int64 tensor of group numbers."""
        count = int(group.max()) + 1
        rows = torch.arange(len(group), device=group.device)
        first = torch.full((count,), len(group), dtype=torch.int64, device=group.device)
        first.scatter_reduce_(0, group, rows, "amin")
        others = rows[first[group] != rows]
        return cls(group, count, first, others)

    @property
    def singletons(self) -> bool:
        """Whether every row is a group of its own."""
        return len(self.others) == 0


class References:
    """Reference vectors prepared for search on one device.

    Distances come in two passes. The expanded square ‖r‖² − 2 q·r of *centred* vectors is one
    matrix product, but loses digits where a query is close to a reference. So it only selects: all
    rows whose approximate score lies within twice its error bound of the k-th best group's are
    kept, which cannot lose a true neighbour, and their scores are computed again from differences.

    Args:
        vectors: (N, D) float32, for ``cosine`` of length 1.
        groups: group of every row.
        metric: ``l2`` or ``cosine``.
        keep_centred: keep a centred copy of the vectors in memory. Without it every exhaustive
            search makes one again, part by part, until something asks for ``centred``.
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
        """The centred vectors in parts of bounded size."""
        if self._has_centred:
            yield from self.centred.split(_rows(self.vectors))
        else:
            for part in self.vectors.split(_rows(self.vectors)):
                yield part - self.centre

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        """Nearest members of the k nearest distinct groups; see ``ReferenceIndex.search``."""
        size = max(1, _SCORES // len(self.vectors))
        parts = [self._search(part, k) for part in queries.split(size)]
        return Hits(torch.cat([p.rows for p in parts]), torch.cat([p.scores for p in parts]))

    def _search(self, queries: Tensor, k: int) -> Hits:
        costs = self._costs(queries)
        error = self.error(queries)
        best = costs if self.groups.singletons else self._best_of_group(costs)
        limit = best.topk(k, dim=1, largest=False).values[:, -1:] + 2 * error
        query, row = torch.nonzero(costs <= limit, as_tuple=True)
        if not self.groups.singletons:
            # Of a group, only members that may be its nearest go on to the second pass.
            near = best[query, self.groups.group[row]] + 2 * error[query, 0]
            keep = costs[query, row] <= near
            query, row = query[keep], row[keep]
        del costs, best
        return self.select(queries, query, row, k)

    def _costs(self, queries: Tensor) -> Tensor:
        """Approximate costs (B, N), lower is nearer: ‖r‖² − 2 q·r (centred), or −q·r."""
        if self.metric == "cosine":
            return self.products(queries).neg_()
        return self.products(queries - self.centre).mul_(-2).add_(self.squared_norms)

    def products(self, queries: Tensor) -> Tensor:
        """Inner products (B, N) of queries (B, D) with the centred references.

        With references on the left and in parts a CPU takes half the time of ``queries @
        centred.T`` where queries are few (docs/results.md, "What it costs").
        """
        with torch.autocast(queries.device.type, enabled=False):
            if queries.device.type != "cpu" and self._has_centred:
                return queries @ self.centred.T
            products = queries.new_empty(len(queries), len(self.vectors))
            start = 0
            for part in self.centred_parts():
                products[:, start : start + len(part)] = (part @ queries.T).T
                start += len(part)
        return products

    def error(self, queries: Tensor) -> Tensor:
        """Bound (B, 1) on the rounding error of approximate costs.

        The probabilistic bound of a D-term product, u·√D·‖q‖·‖r‖ (Higham and Mary, 2019), times a
        generous constant, with u the rounding unit of the device's matrix products.
        """
        factor = 8 * _rounding_unit(queries.device) * (self.vectors.shape[1] ** 0.5 + 1)
        if self.metric == "cosine":
            return queries.new_full((len(queries), 1), factor)
        query = torch.linalg.vector_norm(queries - self.centre, dim=1, keepdim=True)
        reference = self.squared_norms.max().sqrt()
        return factor * reference * (2 * query + reference)

    def _best_of_group(self, costs: Tensor) -> Tensor:
        """Lowest cost of each group (B, groups)."""
        groups = self.groups
        best = costs[:, groups.first]
        index = groups.group[groups.others].expand(len(costs), -1)
        return best.scatter_reduce_(1, index, costs[:, groups.others], "amin")

    def exact_scores(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Scores (P,) of pairs of a query's and a reference's number, from their differences."""
        scores = queries.new_empty(len(query))
        for part in torch.arange(len(query), device=query.device).split(_rows(self.vectors)):
            vectors, q = self.vectors[row[part]], queries[query[part]]
            if self.metric == "l2":
                scores[part] = torch.linalg.vector_norm(vectors.sub_(q), dim=1)
            else:
                scores[part] = vectors.mul_(q).sum(1)
        return scores

    def select(self, queries: Tensor, query: Tensor, row: Tensor, k: int) -> Hits:
        """Score candidate pairs exactly and keep the best member of the k best groups a query.

        Ties go to the lower row. Every query needs candidates from at least k groups.
        """
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
        found = torch.bincount(query[order], minlength=len(queries))
        start = found.cumsum(0) - found
        chosen = order[start[:, None] + torch.arange(k, device=start.device)]
        return Hits(row[chosen], scores[chosen])


def _rows(vectors: Tensor) -> int:
    """How many vectors a temporary may hold."""
    return max(1, _PART // max(1, vectors.shape[1]))


def _mean(vectors: Tensor) -> Tensor:
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for part in vectors.split(_rows(vectors)):
        total += part.sum(0, dtype=torch.float64)
    return (total / len(vectors)).to(torch.float32)


def _rounding_unit(device: torch.device) -> float:
    """Relative error of one operation in a float32 matrix product under the user's settings."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return {"tf32": 2.0**-11, "bf16": 2.0**-8}.get(precision, 2.0**-24)
