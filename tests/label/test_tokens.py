"""Token counts and prices: exact where the tokeniser is there, an upper estimate that says so where not."""

from __future__ import annotations

import re
import sys
import time
from types import SimpleNamespace

import pytest

from novelret.errors import UserError
from novelret.label import tokens
from novelret.label.cost import Price, find_price
from novelret.label.tokens import estimate_tokens, token_counter

QUESTION = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Is it <|endoftext|> so?"},
]


@pytest.fixture
def words(monkeypatch):
    """tiktoken with a vocabulary of single bytes, as a cache that holds the encoding would give it."""
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s", mergeable_ranks={bytes([n]): n for n in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda model: {"known": encoding}[model])


def test_tokens_are_counted_as_the_chat_format_says(words):
    counter = token_counter("known")
    assert counter.exact
    # Each byte a token here; three more around each message, three to begin the answer; a special token's
    # name in a text is only text.
    expected = sum(3 + len(m["role"]) + len(m["content"]) for m in QUESTION) + 3
    assert counter.count(QUESTION) == expected


def test_an_unknown_model_is_estimated(words):
    counter = token_counter("unknown")
    assert not counter.exact
    assert counter.count is estimate_tokens


def test_without_tiktoken_or_its_vocabulary_it_is_estimated(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert not token_counter("gpt-4o").exact
    monkeypatch.setitem(
        sys.modules, "tiktoken", SimpleNamespace(encoding_for_model=lambda model: time.sleep(30))
    )
    monkeypatch.setattr(tokens, "_PATIENCE", 0.05)
    begun = time.monotonic()
    assert not token_counter("gpt-4o").exact
    assert time.monotonic() - begun < 5


def test_the_estimate_is_an_upper_one():
    assert estimate_tokens([{"role": "user", "content": "a" * 300}]) >= 100
    # OpenAI's vocabularies split a text so, whatever their size: a sign may stand before letters, no more.
    for text in ("A1B2-C3D4-E5F6 ", "0.25,1.75;3.5x4.5 ", "Resistor 4.7k 1/4W ", "a b ", "ISBN 978-3-16 "):
        pieces = re.findall(r"[^\w\r\n]?[A-Za-z]+|[0-9]{1,3}| ?[^\s\w]+|\s", text * 60)
        assert estimate_tokens([{"role": "user", "content": text * 60}]) >= len(pieces), text
    # Of common English words each is one token, and it is no more than twice as many.
    sentence = "The quick brown fox jumps over the lazy dog, relevant to the query."
    assert estimate_tokens([{"role": "user", "content": sentence}]) < 8 + 2 * 15
    # Outside ASCII a character can take a token per byte.
    assert estimate_tokens([{"role": "user", "content": "漢" * 100}]) >= 300
    assert estimate_tokens([{"role": "user", "content": "\ud800"}]) > 0


def test_prices():
    assert (
        find_price("gpt-4o-2024-08-06", None) == find_price("gpt-4o", None) != find_price("gpt-4o-mini", None)
    )
    assert find_price("gpt-4o", None, batch=True) == Price(1.25, 5.0)
    assert find_price("gpt-4o-2024-05-13", None) == Price(5.0, 15.0)  # the one that costs more
    assert find_price("gpt-4o", "1,2", batch=True) == Price(1, 2)
    assert find_price("somebody-else", None) is None
    for wrong in ("1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ""):
        with pytest.raises(UserError, match="expected INPUT,OUTPUT"):
            find_price("gpt-4o", wrong)
