"""The judgement store: every answer that was ever paid for, by the hash of what was asked."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
_AT_ONCE = 500  # keys per query, well under SQLite's limit of variables


@dataclass(frozen=True)
class Answer:
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


def key_of(judge: str, messages: list[dict[str, str]], parameters: dict[str, Any]) -> bytes:
    """Identity of a question: the judge with its model, the rendered prompt, the parameters."""
    text = json.dumps([judge, messages, parameters], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def default_store() -> Path:
    """NOVELRET_STORE, else a file in the user's cache folder: one store per user."""
    if os.environ.get("NOVELRET_STORE"):
        return Path(os.environ["NOVELRET_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "novelret" / "judgements.sqlite"


class Store:
    """An append-only table of answers. Several processes may use it at once; each answer is one commit."""

    def __init__(self, path: Path) -> None:
        """Open or make a store.

        Raises:
            UserError: the file cannot be opened, or is no store.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            # FULL: an answer that was acknowledged survives a power cut, since it was paid for.
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be used as a judgement store ({error}); pass --store") from None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """The stored answers among these keys."""
        found: dict[bytes, Answer] = {}
        wanted = list(keys)
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._connection.execute(
                "SELECT key, answer, prompt_tokens, completion_tokens, time FROM answers "
                f"WHERE key IN ({marks})",
                some,
            )
            found.update({key: Answer(*rest) for key, *rest in rows})
        return found

    def add(
        self, key: bytes, judge: str, text: str, prompt_tokens: int | None, completion_tokens: int | None
    ) -> Answer:
        """Keep an answer; a key that exists already keeps its first answer."""
        answer = Answer(
            text, prompt_tokens, completion_tokens, datetime.now(UTC).isoformat(timespec="seconds")
        )
        self._connection.execute(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (key, judge, answer.text, answer.prompt_tokens, answer.completion_tokens, answer.time),
        )
        return answer

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop answers, so that they are asked again: for unusable ones, on the user's word."""
        self._connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
