"""In which order pairs are asked about: wherever asking stops, it has treated all queries alike."""

from __future__ import annotations

import numpy as np


def asking_order(query_rows: np.ndarray) -> np.ndarray:
    """An order in which each query has its turn, one pair at a time; queries and their pairs are shuffled.

    Any first part of it covers the queries evenly and is a random sample of each one's pairs, so that labels
    of a run that a cap stopped are no biased ones. The same pairs always come in the same order.

    Args:
        query_rows: (C,) int64, each pair's query, ascending.

    Returns:
        (C,) positions of the pairs, int32 where they fit.
    """
    rng = np.random.default_rng(0)
    small = np.int32 if len(query_rows) < 1 << 31 else np.int64
    shuffled = rng.permutation(len(query_rows)).astype(small)
    pairs = shuffled[np.argsort(query_rows[shuffled], kind="stable")]  # by query, and within it at random
    starts = np.flatnonzero(np.diff(query_rows, prepend=-1))
    sizes = np.diff(starts, append=len(query_rows))
    turns = np.arange(len(pairs)) - np.repeat(starts, sizes)
    turns *= len(starts)
    turns += np.repeat(rng.permutation(len(starts)), sizes)  # who comes first in each turn
    order: np.ndarray = pairs[np.argsort(turns, kind="stable")]
    return order
