"""The memory that `--tune memory` starts from: training queries and what is known to be relevant to them."""

from __future__ import annotations

import numpy as np
import torch

from novelret.blocks import read_rows
from novelret.errors import UserError
from novelret.memory import Memory
from novelret.train.states import Material

_BELIEVED = 0.5
_NUMBERS = 1 << 24  # of item embeddings at a time: 64 MB


def make_memory(
    material: Material,
    embeddings: np.ndarray,
    items: np.ndarray,
    size: int,
    seed: int,
    own: np.ndarray | None = None,
) -> Memory:
    """Keys are queries of which something is known, and the items that are known to be relevant to them.

    The value of a query is the mean embedding of these items, that of an item the mean of the query's others,
    and of the query itself, where that is an item as well and relevance goes both ways (see `mirror`). A yes
    that is more likely wrong than right (see `trust`) is no knowledge where no feedback agrees.

    Args:
        material: feedback, labels and their trust, of Q training queries.
        embeddings: (Q, d) float32, of these queries, as the frozen encoder gives them.
        items: (N, d) item embeddings, which may be memory-mapped.
        size: most keys. Where there are more, some are drawn by the seed: queries take up to a half and what
            items leave, items (of these queries alone) the rest.
        seed: decides the draw.
        own: (Q,) int64 catalog row of each query that goes with its items, −1 for those that do not; None
            where none does.

    Raises:
        UserError: nothing is known to be relevant to any of the queries.
    """
    query, item = material.relevant.T
    kept = (material.trust_of(query, item) >= _BELIEVED) | material.is_feedback(query, item)
    query, item = query[kept], item[kept]
    rows = np.unique(query)
    rows = rows[np.any(embeddings, axis=1)[rows]]  # an encoder may know none of a query's words
    if len(rows) == 0:
        raise UserError(
            "--tune memory: no training query has feedback or an item that is labelled relevant; "
            "use --tune adapter"
        )
    rng = np.random.default_rng((seed, 0x3E3))
    kept = np.isin(query, rows)
    query, item = query[kept], item[kept]
    own = np.full(len(embeddings), -1) if own is None else own
    pairs = _with_others(query, own)
    most = max(size - len(pairs), (size + 1) // 2)
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
        kept = np.isin(query, rows)
        query, item = query[kept], item[kept]
        pairs = _with_others(query, own)
    if len(pairs) > size - len(rows):
        pairs = np.sort(rng.choice(pairs, size - len(rows), replace=False))
    lengths = np.linalg.norm(embeddings[rows], axis=1, keepdims=True)
    source = np.searchsorted(rows, query)
    means = _means(source, item, items)
    keys, others = _items_and_others(source, item, pairs, means, own[rows], items)
    memory = Memory(embeddings.shape[1], len(rows) + len(pairs), float(lengths.mean()), len(rows))
    with torch.no_grad():
        memory.keys.copy_(torch.from_numpy(np.concatenate([embeddings[rows] / lengths, keys])))
        memory.values.copy_(torch.from_numpy(np.concatenate([means, others])))
        memory.sources[len(rows) :] = torch.from_numpy(source[pairs])
    return memory


def _with_others(query: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Which of the (P,) pairs have an item that something goes with: more items of its query, or that one."""
    return np.flatnonzero((np.bincount(query)[query] > 1) | (own[query] >= 0))


def _items_and_others(
    group: np.ndarray,
    item: np.ndarray,
    pairs: np.ndarray,
    means: np.ndarray,
    own: np.ndarray,
    items: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Of some of the (P,) pairs: the item's embedding, of unit length, and the mean of what goes with it."""
    vectors = read_rows(items, item[pairs])
    counts = np.bincount(group)[group[pairs], None].astype(np.float32)
    others = counts * means[group[pairs]] - vectors
    goes_along = own[group[pairs]] >= 0
    others[goes_along] += read_rows(items, own[group[pairs]][goes_along])
    others /= counts - 1 + goes_along[:, None]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1), others


def _means(group: np.ndarray, item: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The mean item embedding of each group, (n, d) float32, from (P,) ascending groups and their items."""
    counts = np.bincount(group)
    sums = np.zeros((len(counts), items.shape[1]), dtype=np.float32)
    size = max(1, _NUMBERS // items.shape[1])
    for start in range(0, len(group), size):
        part = group[start : start + size]
        vectors = read_rows(items, item[start : start + size])
        of_part, first = np.unique(part, return_index=True)
        sums[of_part] += np.add.reduceat(vectors, first, axis=0)
    means: np.ndarray = sums / counts[:, None].astype(np.float32)
    return means
