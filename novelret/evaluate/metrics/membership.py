"""Which items of some lists are in other lists of the same queries."""

from __future__ import annotations

import numpy as np

_CHUNK = 4_096  # queries at a time: the sort below needs a few times the lists' own memory


def is_in(rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Whether rows[q, i] occurs in lists[q], for items (not −1); bool (Q, k).

    Sorts instead of comparing all with all, so no (Q, k, L) array is made.
    """
    found = np.empty(rows.shape, dtype=bool)
    width = int(max(rows.max(initial=0), lists.max(initial=0))) + 2
    for start in range(0, len(rows), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        offset = np.arange(len(rows[chunk]), dtype=np.int64)[:, None] * width + 1
        found[chunk] = np.isin(rows[chunk] + offset, lists[chunk] + offset)
    return found & (rows >= 0)


def feedback_hits(rows: np.ndarray, feedback_queries: np.ndarray, feedback_items: np.ndarray) -> np.ndarray:
    """Which places of the lists hold feedback of their query; bool (Q, k).

    Args:
        rows: (Q, k) catalog rows.
        feedback_queries: (P,) ascending query rows.
        feedback_items: (P,) catalog rows.
    """
    width = int(max(rows.max(initial=0), feedback_items.max(initial=0))) + 2
    offset = np.arange(len(rows), dtype=np.int64)[:, None] * width + 1
    hits: np.ndarray = np.isin(rows + offset, feedback_items + 1 + feedback_queries * width) & (rows >= 0)
    return hits
