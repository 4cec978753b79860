"""Which items of some lists are in other lists of the same queries."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def is_in(rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Whether rows[q, i] occurs in lists[q], for items (not −1); bool (Q, k)."""
    return _marked(rows, lists, int(max(rows.max(initial=0), lists.max(initial=0))))


def pairs_in(lists: np.ndarray, catalog_size: int) -> np.ndarray:
    """The (query, item) pairs of (Q, E) lists, −1 padded: (n,) int64, query × catalog size + catalog row."""
    query, column = np.nonzero(lists >= 0)
    return query * np.int64(catalog_size) + lists[query, column]


def sorted_union(*arrays: np.ndarray) -> np.ndarray:
    """The distinct values of (n,) int64 arrays, ascending; np.union1d hashes, a hundred times as long."""
    values = np.sort(np.concatenate(arrays), kind="stable")  # of parts that are sorted, this takes one pass
    first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def find_sorted(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which values are among (n,) ascending keys, bool, and where, int64; both of the values' shape."""
    if len(keys) == 0:
        return np.zeros(wanted.shape, dtype=bool), np.zeros(wanted.shape, dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[place] == wanted, place


def feedback_hits(
    rows: np.ndarray, feedback_queries: np.ndarray, feedback_items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which places of the lists hold feedback of their query, and how much each query has.

    Args:
        rows: (Q, k) catalog rows.
        feedback_queries: (P,) ascending query rows.
        feedback_items: (P,) catalog rows.

    Returns:
        (Q, k) bool and (Q,) int64.
    """
    ends = np.searchsorted(feedback_queries, np.arange(len(rows) + 1)).tolist()
    of_query = (feedback_items[ends[q] : ends[q + 1]] for q in range(len(rows)))
    hits = _marked(rows, of_query, int(max(rows.max(initial=0), feedback_items.max(initial=0))))
    return hits, np.diff(ends)


def _marked(rows: np.ndarray, wanted: Iterable[np.ndarray], highest: int) -> np.ndarray:
    """Whether rows[q, i] is among the wanted items of query q.

    One flag per catalog item, set and taken back query by query: a thousand places cost a few microseconds,
    where sorting or comparing all with all costs a hundred. The last flag is that of −1.
    """
    flags = np.zeros(highest + 2, dtype=bool)
    found = np.empty(rows.shape, dtype=bool)
    for q, items in enumerate(wanted):
        flags[items] = True
        found[q] = flags[rows[q]]
        flags[items] = False
    found &= rows >= 0
    return found
