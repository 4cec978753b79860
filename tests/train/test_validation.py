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


def test_frequent_texts_are_held_back_no_sooner_than_others():
    """A log of events: one text makes up a third of it, and a fifth of the texts is drawn, not of the events."""
    texts = ["often"] * 500 + [f"rare {n}" for n in range(1000)]
    split = split_of(texts)
    sizes = []
    for seed in range(20):
        _, held_back = hold_back(split, 0.2, seed)
        assert "often" not in {texts[row] for row in held_back}  # alone more than may be held back
        sizes.append(len(held_back))
    assert set(sizes) == {300}
    pairs = split_of([text for n in range(100) for text in [f"text {n}"] * (10 if n < 10 else 1)])
    drawn = [hold_back(pairs, 0.2, seed)[1] for seed in range(200)]
    share = np.mean([len({row // 10 for row in rows if row < 100}) / 10 for rows in drawn])
    assert 0.12 < share < 0.28
    assert max(len(rows) for rows in drawn) <= 38
