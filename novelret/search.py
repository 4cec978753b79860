"""Exact top-k over the frozen item matrix, with one tie rule everywhere.

The tie rule: scores are compared after rounding to six decimals, which is what a TREC run file holds;
equal scores are ordered by item id, descending, as trec_eval does. A run file written by novelret thus
evaluates to the same numbers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from novelret.blocks import BLOCK, Items, top_k
from novelret.membership import is_in
from novelret.row_lists import RowLists

DECIMALS = 6
_SPARE = 8  # candidates beyond k, so that ties across the boundary are usually seen at once
_GROUPED = 4 ** np.arange(2, 16)  # rows left out, at most, by the queries searched together
_QUERY_CHUNK = 32_768
_BLOCK_BYTES = 128 << 20
_SCORES = 1 << 28  # on a GPU at a time, 1 GiB
_PAIRS = 1 << 24  # candidates fetched at a time, of some 50 bytes each


def nothing(_: int) -> None:
    """An `advance` callback for callers that show no progress."""


def read_faiss(path: Path, params: str | None) -> Any:
    """A faiss index from its file, mapped where it can be; the file does not hold all search parameters."""
    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    if params:
        set_search_params(index, params)
    return index


def compares_products(index: Any) -> bool:
    """Whether a faiss index ranks by inner products; of some factories faiss makes others without a word."""
    return bool(index.metric_type == faiss.METRIC_INNER_PRODUCT)


def faiss_reason(error: RuntimeError) -> str:
    """The end of what faiss says of a fault; before it stand functions and files of its own."""
    return str(error).strip().splitlines()[-1][-200:]


def set_search_params(index: Any, params: str) -> None:
    """Set parameters like "nprobe=16,max_codes=10000".

    Raises:
        RuntimeError: faiss does not take them for this index.
    """
    space: Any = faiss.ParameterSpace()
    space.set_index_parameters(index, params)


def search_exact(
    queries: np.ndarray,
    items: Items,
    k: int,
    id_rank: np.ndarray,
    excluded: RowLists | None = None,
    *,
    device: str = "cpu",
    advance: Callable[[int], None] = nothing,
) -> tuple[np.ndarray, np.ndarray]:
    """The k items with the highest inner product, exactly, in memory that does not grow with Q × N.

    Args:
        queries: (Q, d) float32.
        items: (N, d) float32 or float16, possibly memory-mapped, or a tensor that is on the device.
        k: length of the lists.
        id_rank: (N,) rank of each item's id; ties go to the higher rank.
        excluded: the rows left out of each query's list.
        device: "cpu" or a CUDA device.
        advance: told how many queries are done.

    Returns:
        rows (Q, k) int64 and scores (Q, k) float64 rounded to six decimals, best first; rows are −1
        and scores −inf where a query has fewer than k items left.
    """
    n_queries = len(queries)
    rows = np.empty((n_queries, k), dtype=np.int64)
    scores = np.empty((n_queries, k), dtype=np.float64)
    for start in range(0, n_queries, _QUERY_CHUNK):
        chunk = slice(start, min(start + _QUERY_CHUNK, n_queries))
        of_chunk = None if excluded is None else excluded.take(np.arange(chunk.start, chunk.stop))
        asked, found_rows, found_scores = queries[chunk], rows[chunk], scores[chunk]
        for group, left_out in _groups(of_chunk):
            found = _search_chunk(asked[group], items, k, id_rank, left_out, device)
            found_rows[group], found_scores[group] = found
        advance(chunk.stop - chunk.start)
    return rows, scores


def search_faiss(
    index: Any, queries: np.ndarray, k: int, id_rank: np.ndarray, excluded: RowLists | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same through a faiss index, as approximate as that index is; ties by the same rule."""
    rows = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float64)
    for group, left_out in _groups(excluded):
        wanted = min(k + _SPARE + (0 if left_out is None else left_out.shape[1]), index.ntotal)
        top_scores, top_rows = index.search(np.ascontiguousarray(queries[group], dtype=np.float32), wanted)
        rows[group], scores[group], _ = _finish(top_rows, top_scores, k, id_rank, left_out)
    return rows, scores


def merge_lists(
    rows: np.ndarray, scores: np.ndarray, k: int, id_rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of lists that were found in parts of a catalog, as one search of all of it would give them.

    Args:
        rows: (Q, n) catalog rows, −1 where a part holds no more.
        scores: (Q, n) of these, as `search_exact` gives them.
        k: length of the lists.
        id_rank: (N,) of all items.
    """
    best_rows, best, _ = _finish(rows, scores, k, id_rank, None)
    return best_rows, best


def _groups(excluded: RowLists | None) -> Iterator[tuple[slice | np.ndarray, np.ndarray | None]]:
    """Queries that leave out about as many rows each, and these rows, padded no wider than the group needs.

    As many candidates more than k are fetched as rows may be left out: one query that leaves out thousands
    must not widen the search of all others.
    """
    if excluded is None:
        yield slice(None), None
        return
    counts = excluded.counts
    group_of = np.searchsorted(_GROUPED, counts)
    for number in np.unique(group_of):
        group = np.flatnonzero(group_of == number)
        left_out = excluded.padded(group)
        yield (slice(None) if len(group) == len(excluded) else group), left_out


def _search_chunk(
    queries: np.ndarray,
    items: Items,
    k: int,
    id_rank: np.ndarray,
    excluded: np.ndarray | None,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    width = k + _SPARE + (0 if excluded is None else excluded.shape[1])
    rows = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float64)
    is_zero = ~queries.any(axis=1)
    if is_zero.any():  # a tie of all items, of which the tie rule alone says the first
        first = np.argsort(-id_rank, kind="stable")[:width]
        top_rows = np.repeat(first[None], is_zero.sum(), axis=0)
        left_out = None if excluded is None else excluded[is_zero]
        rows[is_zero], scores[is_zero], _ = _finish(top_rows, np.zeros(top_rows.shape), k, id_rank, left_out)
    todo = np.flatnonzero(~is_zero)
    while len(todo):
        width = min(width, len(items))
        tied = []
        step = max(1, _PAIRS // width)
        for part in np.split(todo, range(step, len(todo), step)):
            top_rows, top_scores = _top(queries[part], items, width, device)
            left_out = None if excluded is None else excluded[part]
            rows[part], scores[part], cut_in_tie = _finish(top_rows, top_scores, k, id_rank, left_out)
            tied.append(part[cut_in_tie])
        if width == len(items):
            break
        # A tie that reaches the end of what was fetched may go on beyond it: look further for those.
        todo = np.concatenate(tied)
        width *= 4
    return rows, scores


def _finish(
    rows: np.ndarray, scores: np.ndarray, k: int, id_rank: np.ndarray, excluded: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply exclusions and the tie rule to fetched candidates; say which lists end inside a tie."""
    rounded = np.round(scores.astype(np.float64), DECIMALS)
    absent = rows < 0
    if excluded is not None and excluded.shape[1]:
        absent |= is_in(rows, excluded)
    rounded[absent] = -np.inf
    rank = np.where(absent, -1, id_rank[np.where(rows < 0, 0, rows)])
    order = np.lexsort((-rank, -rounded), axis=1)[:, :k]
    best = np.take_along_axis(rounded, order, axis=1)
    best_rows = np.where(np.isneginf(best), -1, np.take_along_axis(rows, order, axis=1))
    missing = k - best.shape[1]
    if missing > 0:
        best = np.pad(best, ((0, 0), (0, missing)), constant_values=-np.inf)
        best_rows = np.pad(best_rows, ((0, 0), (0, missing)), constant_values=-1)
    fetched_last = np.round(scores[:, -1].astype(np.float64), DECIMALS)
    return best_rows, best, fetched_last >= best[:, -1]


def _top(queries: np.ndarray, items: Items, width: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The `width` best items per query by unrounded score, block by block."""
    return _top_cpu(queries, items, width) if device == "cpu" else _top_gpu(queries, items, width, device)


def _top_cpu(queries: np.ndarray, items: Items, width: int) -> tuple[np.ndarray, np.ndarray]:
    items = np.asarray(items)
    block = max(width, _BLOCK_BYTES // (4 * items.shape[1]))
    if items.dtype == np.float32:
        block *= 4  # no copy is made, so only the search's own buffers count
    rows = np.empty((len(queries), 0), dtype=np.int64)
    scores = np.empty((len(queries), 0), dtype=np.float32)
    for start in range(0, len(items), block):
        part = items[start : start + block]
        part_scores, part_rows = faiss.knn(
            np.ascontiguousarray(queries, dtype=np.float32),
            np.ascontiguousarray(part, dtype=np.float32),
            min(width, len(part)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        rows = np.concatenate([rows, part_rows + start], axis=1)
        scores = np.concatenate([scores, part_scores], axis=1)
        if rows.shape[1] > width:
            keep = np.argpartition(-scores, width - 1, axis=1)[:, :width]
            rows, scores = np.take_along_axis(rows, keep, axis=1), np.take_along_axis(scores, keep, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _top_gpu(queries: np.ndarray, items: Items, width: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and the best so far, stay on the device: only what is found comes back."""
    rows = np.empty((len(queries), width), dtype=np.int64)
    scores = np.empty((len(queries), width), dtype=np.float32)
    size = max(1, _SCORES // BLOCK)
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        asked = torch.from_numpy(np.array(queries[part], dtype=np.float32)).to(device)
        found_rows, found_scores = top_k(asked, items, width)
        rows[part], scores[part] = found_rows.cpu().numpy(), found_scores.cpu().numpy()
    return rows, scores
