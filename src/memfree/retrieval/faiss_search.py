"""The same exact search with FAISS finding the candidates."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memfree.retrieval.search import Hits, References

# FAISS on GPUs returns at most this many neighbours.
_MOST = 2048
# Neighbours asked for beyond k, as a margin for rounding and for several members of a group.
_MARGIN = 32


class FaissReferences:
    """Search of a flat FAISS index, on a GPU if FAISS sees one, with the results of ``References``.

    FAISS finds candidates by approximate scores, which are then scored exactly. Queries whose
    candidates are not certain to hold all neighbours (very large groups, ties beyond the margin)
    are searched again exhaustively.

    Args:
        references: what to search; FAISS keeps its own, centred copy of the vectors.
    """

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
        size = len(refs.vectors)
        wanted = min(size, (k if refs.groups.singletons else 2 * k) + _MARGIN, _MOST)
        if wanted < k:
            return refs.search(queries, k)
        costs, rows = self._candidates(queries, wanted)
        limit = self._kth_group(costs, rows, k) + 2 * self._error(queries)
        certain = (limit < costs[:, -1:]).squeeze(1) | (wanted == size)
        # Columns beyond the limit are no candidates; of uncertain queries, none are kept.
        keep = (costs <= limit) & certain[:, None]
        query, column = torch.nonzero(keep[certain], as_tuple=True)
        sure = queries[certain]
        result = Hits(rows.new_empty(len(queries), k), costs.new_empty(len(queries), k))
        if len(sure):
            found = refs.select(sure, query, rows[certain][query, column], k)
            result.rows[certain], result.scores[certain] = found.rows, found.scores
        if not bool(certain.all()):
            found = refs.search(queries[~certain], k)
            result.rows[~certain], result.scores[~certain] = found.rows, found.scores
        return result

    def _candidates(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Approximate costs (B, wanted), ascending, in the units of ``References``; and rows."""
        refs = self.references
        centred = queries - refs.centre
        scores, rows = self._index.search(np.ascontiguousarray(centred.cpu().numpy()), wanted)
        costs = torch.from_numpy(scores).to(queries.device)
        rows = torch.from_numpy(rows).to(queries.device)
        if refs.metric == "cosine":
            return -costs, rows
        return costs - centred.square().sum(1, keepdim=True), rows

    def _error(self, queries: Tensor) -> Tensor:
        """As ``References.error``; FAISS also rounds the query's own square."""
        refs = self.references
        if refs.metric == "cosine":
            return refs.error(queries)
        square = (queries - refs.centre).square().sum(1, keepdim=True)
        return refs.error(queries) + 2.0**-20 * square

    def _kth_group(self, costs: Tensor, rows: Tensor, k: int) -> Tensor:
        """Approximate cost (B, 1) of the k-th distinct group; infinite if there are fewer."""
        if self.references.groups.singletons:
            return costs[:, k - 1 : k]
        group = self.references.groups.group[rows]
        order = group.argsort(dim=1, stable=True)
        ordered = group.gather(1, order)
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first = torch.zeros_like(new).scatter_(1, order, new)
        reached = (first.cumsum(1) == k) & first
        return torch.where(reached, costs, torch.inf).amin(1, keepdim=True)
