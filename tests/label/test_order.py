"""The order of asking: every pair once, queries in turn, whatever their sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from novelret.data.split import load_split
from novelret.index import open_index
from novelret.label import candidates
from novelret.label.candidates import gather_candidates
from novelret.label.order import asking_order
from novelret.progress import Reporter


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


def test_a_few_pairs_of_each_query_are_drawn_some_queries_at_a_time(world, index_folder, monkeypatch):
    index = open_index(index_folder)
    split = load_split(str(world), "train", index.catalog)

    def gather(per_query):
        found = gather_candidates(
            index, split, ("base-novel",), base_depth=3, depth=12, per_query=per_query, seed=0, device="cpu",
            report=Reporter(),
        )  # fmt: skip
        return list(zip(found.query_rows.tolist(), found.item_rows.tolist(), strict=True))

    whole = gather(None)
    assert len(whole) == 9 * len(split)
    at_once = gather(4)
    monkeypatch.setattr(candidates, "_QUERIES_AT_ONCE", 3)
    assert len(split) % 3 > 0
    assert gather(None) == whole
    for drawn in (at_once, gather(4)):
        assert set(drawn) < set(whole)
        assert np.bincount([query for query, _ in drawn]).tolist() == [4] * len(split)
        assert drawn == [pair for pair in whole if pair in set(drawn)]  # by rank within a query
