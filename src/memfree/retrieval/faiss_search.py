"""The same exact search with FAISS finding the candidates."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memfree.retrieval.search import Hits, References, candidates, check_finite, kth_group

# FAISS on GPUs returns at most this many neighbours.
_MOST = 2048


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
        check_finite(queries)
        size = len(refs.vectors)
        wanted = min(size, candidates(k, refs.groups), _MOST)
        if wanted < k:
            return refs.search(queries, k)
        costs, rows = self._candidates(queries, wanted)
        limit = kth_group(costs, rows, k, refs.groups) + 2 * self._error(queries)
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
