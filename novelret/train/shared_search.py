"""Exact lists where processes share the catalog: each searches its part, on its device, for all of them."""

from __future__ import annotations

import numpy as np

from novelret.row_lists import RowLists, row_lists
from novelret.search import merge_lists, search_exact
from novelret.train.matrix import ItemMatrix
from novelret.train.processes import Processes


def search_shared(
    items: ItemMatrix,
    processes: Processes,
    queries: np.ndarray,
    k: int,
    id_rank: np.ndarray,
    excluded: RowLists,
) -> np.ndarray:
    """The lists of this process's queries in the whole catalog; all processes have to call it.

    Args:
        items: the catalog, of which this process holds a share.
        processes: who shares it.
        queries: (b, d) float32, of this process; it may have none.
        k: length of the lists.
        id_rank: (N,) of all items (see `search_exact`).
        excluded: the rows left out of each of these queries' lists.

    Returns:
        (b, k) int64 catalog rows, best first, −1 where fewer are left.
    """
    assert items.shard is not None
    first, size = items.shard.first, len(items.held)
    shares = processes.concatenate(np.array([len(queries)]))
    asked = processes.concatenate(queries)
    counts, rows = processes.concatenate(excluded.counts), processes.concatenate(excluded.rows)
    is_here = (rows >= first) & (rows < first + size)
    of_query = np.repeat(np.arange(len(asked)), counts)
    left_out = row_lists(of_query[is_here], rows[is_here] - first, len(asked))
    if size:
        here = id_rank[first : first + size]
        found, scores = search_exact(asked, items.held, k, here, left_out, device=processes.device)
        found = np.where(found < 0, -1, found + first)
    else:  # of a small catalog, which had no part left
        found, scores = np.full((len(asked), k), -1), np.full((len(asked), k), -np.inf)
    mine = slice(shares[: processes.rank].sum(), shares[: processes.rank + 1].sum())
    shape = processes.size, len(asked), k
    of_parts = (processes.concatenate(array).reshape(shape)[:, mine] for array in (found, scores))
    rows, scores = (of_part.swapaxes(0, 1).reshape(len(queries), processes.size * k) for of_part in of_parts)
    return merge_lists(rows, scores, k, id_rank)[0]
