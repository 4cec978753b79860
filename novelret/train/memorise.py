"""The memory that `--tune memory` starts from: training queries, and what is known to be relevant to them."""

from __future__ import annotations

import numpy as np
import torch

from novelret.errors import UserError
from novelret.memory import Memory
from novelret.train.states import Material

_NUMBERS = 1 << 24  # of item embeddings at a time: 64 MB


def make_memory(
    material: Material, embeddings: np.ndarray, items: np.ndarray, size: int, seed: int
) -> Memory:
    """Keys are the queries of which something is known, values the mean embedding of what that is.

    Args:
        material: feedback and labels of Q training queries.
        embeddings: (Q, d) float32, of these queries, as the frozen encoder gives them.
        items: (N, d) item embeddings, which may be memory-mapped.
        size: most keys; where more queries qualify, some drawn by the seed.
        seed: decides the draw.

    Raises:
        UserError: nothing is known to be relevant to any of the queries.
    """
    split = material.split
    query, item = material.labels.relevant_and(split.feedback_queries, split.feedback_items)
    rows = np.unique(query)
    rows = rows[np.linalg.norm(embeddings[rows], axis=1) > 0]  # an encoder may know none of a query's words
    if len(rows) == 0:
        raise UserError(
            "--tune memory: no training query has feedback or an item that is labelled relevant; "
            "use --tune adapter"
        )
    if len(rows) > size:
        rows = np.sort(np.random.default_rng((seed, 0x3E3)).choice(rows, size, replace=False))
    kept = np.isin(query, rows)
    query, item = query[kept], item[kept]
    lengths = np.linalg.norm(embeddings[rows], axis=1, keepdims=True)
    memory = Memory(embeddings.shape[1], len(rows), float(lengths.mean()))
    with torch.no_grad():
        memory.keys.copy_(torch.from_numpy(embeddings[rows] / lengths))
        memory.values.copy_(torch.from_numpy(_means(np.searchsorted(rows, query), item, items)))
    return memory


def _means(group: np.ndarray, item: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The mean item embedding of each group, (n, d) float32, from (P,) ascending groups and their items."""
    counts = np.bincount(group)
    sums = np.zeros((len(counts), items.shape[1]), dtype=np.float32)
    size = max(1, _NUMBERS // items.shape[1])
    for start in range(0, len(group), size):
        part = group[start : start + size]
        # In ascending order of a memory map, each row once.
        unique, place = np.unique(item[start : start + size], return_inverse=True)
        vectors = np.asarray(items[unique], dtype=np.float32)[place]
        of_part, first = np.unique(part, return_index=True)
        sums[of_part] += np.add.reduceat(vectors, first, axis=0)
    means: np.ndarray = sums / counts[:, None].astype(np.float32)
    return means
