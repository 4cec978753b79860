"""Exact search against brute force, ties and exclusions included."""

import faiss
import numpy as np
import pytest
import torch

from novelret import search
from novelret.row_lists import row_lists
from tests.rows import from_padded


def brute_force(queries, items, k, id_rank, excluded):
    scores = np.round(queries.astype(np.float64) @ items.astype(np.float64).T, search.DECIMALS)
    lists = []
    for q, row in enumerate(scores):
        left = [i for i in range(len(items)) if i not in set(excluded[q])]
        lists.append(sorted(left, key=lambda i: (-row[i], -id_rank[i]))[:k])
    return lists


@pytest.mark.parametrize("block_bytes", [1 << 8, 1 << 28])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("device", ["cpu", "cpu:0"], ids=["cpu", "as on a gpu"])
def test_matches_brute_force_with_ties(monkeypatch, block_bytes, dtype, device):
    monkeypatch.setattr(search, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(search, "_SCORES", 7 * search.BLOCK)  # queries at a time, on a GPU
    rng = np.random.default_rng(0)
    # Few distinct small-integer vectors: exact arithmetic and ties far longer than the spare candidates.
    items = rng.integers(-1, 2, size=(300, 3)).astype(dtype)
    queries = rng.integers(-1, 2, size=(20, 3)).astype(np.float32)
    id_rank = rng.permutation(300)
    excluded = rng.integers(-1, 300, size=(20, 2))
    rows, scores = search.search_exact(queries, items, 25, id_rank, from_padded(excluded), device=device)
    assert rows.tolist() == brute_force(queries, items, 25, id_rank, excluded)
    if device != "cpu":
        held, _ = search.search_exact(
            queries, torch.from_numpy(items), 25, id_rank, from_padded(excluded), device=device
        )
        assert (held == rows).all()
    assert np.allclose(scores, np.take_along_axis(queries @ items.astype(np.float32).T, rows, axis=1))


def test_ties_of_many_are_fetched_a_few_queries_at_a_time(monkeypatch):
    rng = np.random.default_rng(2)
    items = np.repeat(rng.integers(-1, 2, size=(3, 4)), 200, axis=0).astype(np.float32)
    queries = np.concatenate([np.zeros((6, 4)), rng.integers(-1, 2, size=(30, 4))]).astype(np.float32)
    id_rank = rng.permutation(600)
    excluded = np.argsort(-id_rank)[rng.integers(-1, 30, size=(36, 2))]
    fetched = []
    real = search._top

    def top(queries, items, width, device):
        fetched.append(len(queries) * width)
        assert queries.any(axis=1).all()  # without an embedding all items tie: nothing to search for
        return real(queries, items, width, device)

    monkeypatch.setattr(search, "_top", top)
    monkeypatch.setattr(search, "_PAIRS", 700)
    rows, _ = search.search_exact(queries, items, 25, id_rank, from_padded(excluded))
    assert rows.tolist() == brute_force(queries, items, 25, id_rank, excluded)
    assert max(fetched) <= 700


def test_a_query_that_leaves_out_many_does_not_widen_the_others(monkeypatch):
    rng = np.random.default_rng(3)
    items = rng.normal(size=(500, 8)).astype(np.float32)
    queries = rng.normal(size=(40, 8)).astype(np.float32)
    id_rank = rng.permutation(500)
    excluded = np.full((40, 400), -1)
    excluded[:, 3] = rng.integers(-1, 500, 40)
    excluded[7] = rng.choice(500, 400, replace=False)
    excluded[9, ::5] = excluded[7, ::5]
    fetched = []
    real = search._top
    monkeypatch.setattr(
        search, "_top", lambda q, i, width, d: fetched.append((len(q), width)) or real(q, i, width, d)
    )
    rows, scores = search.search_exact(queries, items, 10, id_rank, from_padded(excluded))
    assert rows.tolist() == brute_force(queries, items, 10, id_rank, excluded)
    assert sorted(fetched) == [(1, 10 + 8 + 81), (1, 10 + 8 + 400), (38, 10 + 8 + 1)]
    index = faiss.IndexFlatIP(8)
    index.add(items)
    same = search.search_faiss(index, queries, 10, id_rank, from_padded(excluded))
    assert (same[0] == rows).all()
    assert np.allclose(same[1], scores)


def test_pads_where_too_few_items_are_left():
    items = np.eye(3, dtype=np.float32)
    rows, scores = search.search_exact(items[:1], items, 3, np.arange(3), from_padded(np.array([[0, 2]])))
    assert rows.tolist() == [[1, -1, -1]]
    assert np.isneginf(scores[0, 1:]).all()


def test_query_chunks_do_not_change_the_lists(monkeypatch):
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(50, 8)).astype(np.float32)
    items = rng.normal(size=(400, 8)).astype(np.float32)
    whole, _ = search.search_exact(queries, items, 10, np.arange(400))
    monkeypatch.setattr(search, "_QUERY_CHUNK", 7)
    chunked, _ = search.search_exact(queries, items, 10, np.arange(400))
    assert (whole == chunked).all()


def test_lists_of_rows_take_no_more_room_than_their_rows():
    rng = np.random.default_rng(8)
    lists = [rng.choice(50, size, replace=False).tolist() for size in (0, 3, 7, 0, 1)]
    pairs = np.array([[q, row] for q, rows in enumerate(lists) for row in rows])
    mixed = pairs[np.argsort(pairs[:, 1] % 7, kind="stable")]
    held = row_lists(*mixed.T, len(lists))
    assert held.counts.tolist() == [0, 3, 7, 0, 1]
    assert [set(held.take([q]).rows.tolist()) for q in range(5)] == [set(rows) for rows in lists]
    again = row_lists(*pairs.T, len(lists))  # within a query as they come
    assert again.padded(np.array([2, 0, 1])).tolist() == [
        lists[2], [-1] * 7, lists[1] + [-1] * 4
    ]  # fmt: skip
    assert again.padded(np.array([4, 3])).tolist() == [lists[4], [-1]]
    assert again.padded(np.array([3, 0])).shape == (2, 0)
    some = again.take(np.array([4, 2, 2, 0]))
    assert some.rows.tolist() == lists[4] + lists[2] + lists[2]
    assert some.counts.tolist() == [1, 7, 7, 0]
    more = again.followed_by(some)
    assert [more.take([q]).rows.tolist() for q in range(9)] == [*lists, lists[4], lists[2], lists[2], []]
    assert again.pairs(50).tolist() == (pairs[:, 0] * 50 + pairs[:, 1]).tolist()
    assert len(again.rows) == 11
