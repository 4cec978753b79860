"""Which queries are held back, and what a checkpoint is worth on them."""

import numpy as np
import pytest

from novelret.data.split import make_split
from novelret.train.validation import Point, best_first, hold_back, make_point, pareto
from tests.rows import from_padded


def split_of(texts):
    rows = np.arange(len(texts))
    return make_split(
        "train", [str(row) for row in rows], texts, rows, rows, from_padded(np.full((len(texts), 1), -1))
    )


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
    # Alone nearly all of it: not all of the other texts are held back.
    split = split_of(["often"] * 850 + [f"rare {n}" for n in range(150)])
    assert {len(hold_back(split, 0.2, seed)[1]) for seed in range(20)} == {76}
    pairs = split_of([text for n in range(100) for text in [f"text {n}"] * (10 if n < 10 else 1)])
    drawn = [hold_back(pairs, 0.2, seed)[1] for seed in range(200)]
    share = np.mean([len({row // 10 for row in rows if row < 100}) / 10 for rows in drawn])
    assert 0.12 < share < 0.28
    assert max(len(rows) for rows in drawn) <= 38


@pytest.mark.parametrize("labelled", [0.05, 0.5, 1.0])
def test_novel_items_without_a_label_count_at_the_rate_of_the_labelled_ones(labelled):
    rng = np.random.default_rng(0)
    relevant, judged = rng.random((40_000, 20)) < 0.1, rng.random((40_000, 20)) < labelled
    none = np.full(40_000, 0.5)
    figures = [np.full(40_000, 20.0), (relevant & judged).sum(axis=1), judged.sum(axis=1), none, none]
    point = make_point(3, np.stack(figures, axis=1).astype(float))
    assert point.relevant_novel == pytest.approx(2 * labelled, rel=0.05)
    assert point.likely == pytest.approx(relevant.sum(axis=1).mean(), rel=0.05)
    assert point.judged_novel == pytest.approx(labelled, rel=0.05)
    if labelled == 1:
        assert point.likely == point.relevant_novel


def test_a_few_labels_say_little_of_what_has_none():
    figures = np.array([[10.0, 1, 1, 0.5, 0.5], [10.0, 1, 1, 0.5, 0.5], [10.0, 0, 0, 0.5, 0.5]])
    assert make_point(3, figures).likely == pytest.approx(2 / 3 + 28 / 3 * 2 / 102)
    figures[:, 1:3] = 0
    assert make_point(3, figures).likely == 0


def test_a_checkpoint_that_moved_beyond_the_labels_is_not_worth_less_for_it():
    near = Point(5, 10.0, 1.0, 0.6, 1.0, 1.0, 0.6, 0.01)
    far = Point(10, 20.0, 0.9, 0.6, 0.5, 1.8, 0.6, 0.01)
    assert best_first([near, far], 0.0) == [far, near]
    assert pareto([near, far]) == [False, True]


def test_novel_items_that_are_all_irrelevant_are_no_reason_to_lose_recall():
    start = Point(0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0)
    judged = Point(40, 20.0, 0.0, 0.496, 1.0, 0.0, 0.5, 0.01)
    unjudged = Point(80, 10.0, 0.0, 0.496, 0.5, 0.0, 0.5, 0.01)
    assert best_first([judged, start], 0.01) == [start, judged]
    assert best_first([start, judged, unjudged], 0.01) == [unjudged, start, judged]
