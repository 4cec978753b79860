"""Pairs at random: as many as were asked for, each as likely as any other, none that may not be ranked."""

import numpy as np
import pytest
from scipy import stats

from novelret.label.candidates import _random_items
from novelret.row_lists import row_lists


@pytest.mark.parametrize(
    ("size", "count"), [(400, 20), (60, 40)]
)  # drawn anew where twice, and query by query
def test_items_at_random(size, count):
    rng = np.random.default_rng(0)
    queries = 600
    left_out = [rng.choice(size, n % 5, replace=False) for n in range(queries)]
    excluded = row_lists(
        np.repeat(np.arange(queries), [len(rows) for rows in left_out]), np.concatenate(left_out), queries
    )
    lists = _random_items(size, count, excluded, rng)
    assert lists.shape == (queries, count)
    drawn = np.zeros(size)
    possible = np.zeros(size)
    for row, out in zip(lists, left_out, strict=True):
        assert len(set(row)) == count
        assert row.min() >= 0
        assert row.max() < size
        assert not set(row) & set(out)
        drawn[row] += 1
        possible += ~np.isin(np.arange(size), out) / (size - len(out))
    assert stats.chisquare(drawn, possible / possible.sum() * drawn.sum()).pvalue > 0.01


def test_a_query_that_leaves_out_nearly_all_gets_what_is_left():
    excluded = row_lists(np.repeat([0, 1], [28, 0]), np.arange(28), 2)
    lists = _random_items(30, 5, excluded, np.random.default_rng(0))
    assert sorted(lists[0]) == [-1, -1, -1, 28, 29]
    assert len(set(lists[1])) == 5
