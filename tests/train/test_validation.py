"""Which queries are held back."""

import numpy as np

from novelret.data.split import make_split
from novelret.train.validation import hold_back


def split_of(texts):
    rows = np.arange(len(texts))
    return make_split("train", [str(row) for row in rows], texts, rows, rows, np.full((len(texts), 1), -1))


def test_a_share_is_held_back_by_the_seed():
    split = split_of([f"query {n}" for n in range(50)])
    training, held_back = hold_back(split, 0.2, 3)
    assert sorted([*training, *held_back]) == list(range(50))
    assert len(held_back) == 10
    assert np.array_equal(hold_back(split, 0.2, 3)[1], held_back)
    assert not np.array_equal(hold_back(split, 0.2, 4)[1], held_back)


def test_queries_of_one_text_stay_together():
    split = split_of([f"Query  {n // 4}" if n % 2 else f"query {n // 4}" for n in range(200)])
    training, held_back = hold_back(split, 0.3, 0)
    assert len(held_back) == 60
    assert not {row // 4 for row in training} & {row // 4 for row in held_back}
