"""The judgement store: identities, several writers, commits that are whole."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from novelret.errors import UserError
from novelret.label.claims import Claims
from novelret.label.ledger import Ledger
from novelret.label.store import KEY_SIZE, Store, key_function
from novelret.label.table import make_table
from tests.label.test_injections import HOSTILE
from tests.rows import from_padded


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_key_is_the_hash_of_the_questions_json(text):
    parameters = {"temperature": 0, "max_tokens": 5}
    for messages in (
        [{"role": "system", "content": "é\n"}, {"role": "user", "content": text}],
        [{"query": text, "item": "x"}],
    ):
        whole = json.dumps(["openai:m", messages, parameters], sort_keys=True, ensure_ascii=False)
        expected = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=KEY_SIZE).digest()
        assert key_function("openai:m", parameters)(messages) == expected


def test_whatever_decides_an_answer_decides_the_key():
    messages = [{"role": "user", "content": "a"}]
    keys = {
        key_function("openai:m", {"t": 0})(messages),
        key_function("openai:n", {"t": 0})(messages),
        key_function("openai:m", {"t": 1})(messages),
        key_function("openai:m", {"t": 0})([{"role": "user", "content": "b"}]),
        key_function("openai:m", {"t": 0})([{"role": "system", "content": "a"}]),
    }
    assert len(keys) == 5


def test_answers_are_found_by_any_writer_and_replaced_by_later_ones(tmp_path):
    keys = [bytes([n // 256, n % 256] * 8) for n in range(5_000)]
    with closing(Store(tmp_path / "s")) as first, closing(Store(tmp_path / "s")) as second:
        first.add("openai:m", [(key, "Yes", 5, 1) for key in keys[:3_000]])
        second.add("openai:m", [(key, "No", None, None) for key in keys[2_999:4_000]])
        assert first.known(keys) == set(keys[:4_000])
        found = second.find(keys)
        assert {key: answer.text for key, answer in found.items()} == {
            key: "Yes" if n < 2_999 else "No" for n, key in enumerate(keys[:4_000])
        }
        assert (found[keys[0]].prompt_tokens, found[keys[3_999]].prompt_tokens) == (5, None)


def test_a_commit_is_whole_or_nothing(tmp_path):
    with closing(Store(tmp_path / "s")) as store:
        with pytest.raises(sqlite3.Error):
            store.add("openai:m", [(b"a" * 16, "Yes", 1, 1), (b"b" * 16, None, 1, 1)])
        assert store.known([b"a" * 16, b"b" * 16]) == set()
        store.add("openai:m", [(b"a" * 16, "Yes", 1, 1)])
        assert store.known([b"a" * 16]) == {b"a" * 16}


def test_a_run_that_was_killed_before_its_first_claim_leaves_nothing(tmp_path):
    left = tmp_path / "store.sqlite-asking-0123456789ab"
    left.touch()
    with closing(Store(tmp_path / "store.sqlite")) as store, Claims(store) as mine:
        assert not left.exists()
        with closing(Store(tmp_path / "store.sqlite")) as other, Claims(other) as others:
            assert mine.take([b"a" * 16]) == {b"a" * 16}
            assert others.take([b"a" * 16]) == set()
    assert not list(tmp_path.glob("*-asking-*"))


def test_a_link_to_a_store_is_that_store(tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "store.sqlite"
    link.symlink_to(tmp_path / "store.sqlite")
    with closing(Store(tmp_path / "store.sqlite")) as one, closing(Store(link)) as two:
        with Claims(one) as mine, Claims(two) as theirs:
            assert mine.take([b"a" * 16]) == {b"a" * 16}
            assert theirs.take([b"a" * 16]) == set()
        with Ledger(one, "j").lock() as is_ours:
            assert is_ours
            assert (tmp_path / "store.sqlite.lock").exists()
        two.add("j", [(b"b" * 16, "Yes", 1, 1)])
        assert two.log.exists()
    assert list((tmp_path / "links").iterdir()) == [link]


def test_judgements_of_items_that_a_query_leaves_out_are_dropped():
    table = make_table(
        np.array([0, 0, 1, 1]), np.array([3, 4, 3, 5]), np.array([1, 0, 1, 1], dtype=np.int8), 9,
        grades=np.array([1, 0, np.nan, 0.7]),
    )  # fmt: skip
    found = table.without(from_padded(np.array([[3, -1], [-1, 5], [3, 4]])))
    assert found.query_rows.tolist() == [0, 1]
    assert found.item_rows.tolist() == [4, 3]
    assert found.verdicts.tolist() == [0, 1]
    assert np.array_equal(found.grades, [0, np.nan], equal_nan=True)
    assert table.without(from_padded(np.full((3, 1), -1))).keys.tolist() == table.keys.tolist()


def test_what_is_no_store_is_told_in_a_line(tmp_path):
    (tmp_path / "s").write_text("a file of something else, long enough to be no SQLite header at all")
    with pytest.raises(UserError, match="cannot be used as a judgement store"):
        Store(tmp_path / "s")
