"""The judgement store: every answer that was ever paid for, by the hash of what was asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring as _string
from pathlib import Path
from typing import Any, NamedTuple

from novelret.database import open_database, select, transaction
from novelret.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY,
    judge TEXT NOT NULL,
    answer TEXT NOT NULL,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    time TEXT NOT NULL
) WITHOUT ROWID
"""
KEY_SIZE = 16
"""Bytes of a key."""


class Answer(NamedTuple):
    """A judge's answer as it came.

    Attributes:
        text: the raw answer.
        prompt_tokens: as billed; None where the endpoint does not say.
        completion_tokens: likewise.
        time: when it was stored, UTC.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    time: str


def now() -> str:
    """The time as answers have it, UTC; the order of texts is that of times."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def key_function(judge: str, parameters: dict[str, Any]) -> Callable[[list[dict[str, str]]], bytes]:
    """Messages → identity of a question: the judge with its model, the rendered prompt, the parameters.

    Hashes the JSON of [judge, messages, parameters] with sorted keys. It is put together by hand, and what
    all questions begin with is hashed once: this would otherwise take most of the time that known pairs cost.
    """
    tail = f"], {json.dumps(parameters, sort_keys=True, ensure_ascii=False)}]"

    @lru_cache(maxsize=16)
    def begun(content: str, role: str) -> Any:
        """The hash of everything up to the end of a first message, which is the same for all questions."""
        text = f'[{_string(judge)}, [{{"content": {_string(content)}, "role": {_string(role)}}}'
        return _hash(text)

    def key_of(messages: list[dict[str, str]]) -> bytes:
        if len(messages) == 2:
            digest = begun(messages[0]["content"], messages[0]["role"]).copy()
            text = ", " + _json_of(messages[1]) + tail
            digest.update(text.encode("utf-8", "surrogatepass"))
        else:
            digest = _hash(f"[{_string(judge)}, [{', '.join(map(_json_of, messages))}{tail}")
        key: bytes = digest.digest()
        return key

    return key_of


def _hash(text: str) -> Any:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_SIZE)


def _json_of(message: dict[str, str]) -> str:
    """A message as JSON with sorted keys; it holds content and role, or item and query."""
    first, second = ("content", "role") if "role" in message else ("item", "query")
    return f'{{"{first}": {_string(message[first])}, "{second}": {_string(message[second])}}}'


def default_store() -> Path:
    """NOVELRET_STORE, else a file in the user's cache folder: one store per user."""
    if os.environ.get("NOVELRET_STORE"):
        return Path(os.environ["NOVELRET_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "novelret" / "judgements.sqlite"


class Store:
    """The table of answers. Several processes may use it at once.

    Attributes:
        path: the SQLite file.
        connection: to it.
    """

    def __init__(self, path: Path) -> None:
        """Open or make a store.

        Raises:
            UserError: the file cannot be opened, or is no store.
        """
        try:
            # What lies beside the file, its locks and its log, lies beside it and not beside a link to it.
            self.path = path.resolve()
            self.connection = open_database(self.path, _SCHEMA)
            # FULL: an answer that was acknowledged survives a power cut, since it was paid for.
            self.connection.execute("PRAGMA synchronous = FULL")
            # Keys are found all over the file: reading it through the page cache saves a third of the time.
            self.connection.execute(f"PRAGMA mmap_size = {1 << 30}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be used as a judgement store ({error}); pass --store") from None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """The stored answers among these keys."""
        columns = "key, answer, prompt_tokens, completion_tokens, time"
        return {key: Answer(*rest) for key, *rest in self.select(f"{columns} FROM answers", keys)}

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Which of these keys have an answer."""
        return {key for (key,) in self.select("key FROM answers", keys)}

    def add(self, judge: str, answers: Iterable[tuple[bytes, str, int | None, int | None]]) -> None:
        """Keep (key, text, prompt tokens, completion tokens), all in one commit.

        A key that was asked again has its new answer from then on; until then the old one stands.
        """
        time = now()
        rows = [(key, judge, text, prompt, completion, time) for key, text, prompt, completion in answers]
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)

    def relax(self) -> None:
        """From here on a commit survives a kill at once, but a power cut only when `log` has been synced.

        For answers that come one by one: waiting for the disk each time would slow the asking.
        """
        self.connection.execute("PRAGMA synchronous = NORMAL")

    @property
    def log(self) -> Path:
        """The file that commits go to first."""
        return self.path.with_name(self.path.name + "-wal")

    def transaction(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """All that is done inside is kept together or not at all."""
        return transaction(self.connection)

    def select(self, what: str, keys: Iterable[bytes]) -> list[tuple[Any, ...]]:
        """Rows whose `key` is among these keys; `what` names columns and table."""
        return list(select(self.connection, what, keys))

    def close(self) -> None:
        """Close the file."""
        self.connection.close()
