"""The order of asking: every pair once, queries in turn, whatever their sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from novelret.label.order import asking_order


@pytest.mark.parametrize("sizes", [[], [1], [3, 0, 1, 7, 2], [5] * 40, [0, 0, 4]])
def test_every_query_has_its_turn(sizes):
    query_rows = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    order = asking_order(query_rows)
    assert sorted(order.tolist()) == list(range(len(query_rows)))
    given: Counter[int] = Counter()
    for row in order:
        query = int(query_rows[row])
        # Nobody who still has pairs has had fewer turns.
        assert all(given[other] >= given[query] or given[other] == size for other, size in enumerate(sizes))
        given[query] += 1
    assert np.array_equal(order, asking_order(query_rows))


def test_neither_first_queries_nor_first_pairs_come_first():
    query_rows = np.repeat(np.arange(1000), 50)
    first = asking_order(query_rows)[:500]
    assert abs(query_rows[first].mean() - 499.5) < 5 * 289 / np.sqrt(500)
    assert abs((first % 50).mean() - 24.5) < 5 * 14.4 / np.sqrt(500)
