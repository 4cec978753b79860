"""Rewards by hand; unknown is never 0."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from novelret.errors import UserError
from novelret.label.table import make_table
from novelret.train.rewards import eq6, eq7, graded, load_reward, reward_file

VERDICTS = torch.tensor([1, 1, 0, 0, -1, -1], dtype=torch.int8)
GRADES = torch.tensor([3.0, 2.0, 1.0, 0.0, torch.nan, torch.nan])
IN_BASE = torch.tensor([False, True] * 3)


@pytest.mark.parametrize(
    ("reward", "expected"), [(eq6, [1, -1, -1, -1]), (eq7, [1, -1, 0, 0]), (graded, [3, -2, 0, 0])]
)
def test_the_papers_rewards(reward, expected):
    found = reward(VERDICTS, GRADES, IN_BASE)
    assert found[:4].tolist() == expected
    assert torch.isnan(found[4:]).all()


def test_a_users_own_reward(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def twice(verdicts, grades, in_base):\n    return 2.0 * (verdicts == 1)\n"
        "def short(verdicts, grades, in_base):\n    return verdicts[:1]\n"
    )
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    monkeypatch.chdir(tmp_path)  # as a console script finds it: beside the user
    found = load_reward("mine:twice")(VERDICTS, GRADES, IN_BASE)
    assert found[:4].tolist() == [2, 2, 0, 0]
    assert torch.isnan(found[4:]).all()  # what was not judged has no reward, whatever the function gives
    for name in (":twice", ".mine:twice"):
        with pytest.raises(UserError, match="cannot be imported"):
            load_reward(name)
    with pytest.raises(UserError, match=r"returned \(1,\), expected a tensor of shape \(6,\)"):
        load_reward("mine:short")(VERDICTS, GRADES, IN_BASE)
    with pytest.raises(UserError, match="has no function other"):
        load_reward("mine:other")
    with pytest.raises(UserError, match="cannot be imported"):
        load_reward("not_there_at_all:f")
    assert reward_file("mine:twice") == tmp_path / "mine.py"
    assert reward_file("eq7") is reward_file("operator:add") is None  # the latter has no source
    sys.modules.pop("mine", None)


def test_tables_look_up_whole_arrays_and_keep_the_last_word():
    queries, items = np.array([0, 1, 1, 0, 2]), np.array([5, 3, 3, 7, 1])
    verdicts, grades = np.array([1, 0, 1, -1, 0]), np.array([3, 0, 2, np.nan, np.nan], dtype=np.float32)
    table = make_table(queries, items, verdicts, 10, grades=grades)
    assert len(table) == 3  # the unusable answer is no label, the second word on (1, 3) counts
    asked = np.array([[5, 3, -1], [3, 5, 7], [1, 0, 0]])
    rows = np.array([[0], [1], [2]])
    assert table.lookup(rows, asked).tolist() == [[1, -1, -1], [1, -1, -1], [0, -1, -1]]
    assert np.array_equal(
        table.lookup_grades(rows, asked),
        [[3, np.nan, np.nan], [2, np.nan, np.nan], [0, np.nan, np.nan]],
        equal_nan=True,
    )
    complete = make_table(queries, items, verdicts, 10, missing=0)
    assert complete.lookup(rows, asked).tolist() == [[1, 0, -1], [1, 0, 0], [0, 0, 0]]
    rng = np.random.default_rng(0)
    q, i, v = rng.integers(0, 30, 500), rng.integers(0, 40, 500), rng.integers(0, 2, 500)
    by_hand = dict(zip(zip(q.tolist(), i.tolist(), strict=True), v.tolist(), strict=True))
    found = make_table(q, i, v, 40).lookup(np.arange(30)[:, None], np.arange(40)[None])
    assert all(found[a, b] == by_hand.get((a, b), -1) for a in range(30) for b in range(40))
