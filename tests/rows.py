"""Ragged lists of rows, from arrays as tests write them."""

from __future__ import annotations

import numpy as np

from novelret.row_lists import RowLists, row_lists


def from_padded(lists: np.ndarray) -> RowLists:
    """Lists from an array: (Q, E), −1 padded."""
    query, column = np.nonzero(lists >= 0)
    return row_lists(query, lists[query, column], len(lists))
