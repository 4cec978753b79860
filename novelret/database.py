"""SQLite files that several processes use at once."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_WAIT = 60.0  # seconds that another process may hold a file
_MOMENT = 0.01  # seconds
_AT_ONCE = 1_000  # keys per query, well under SQLite's limit of variables


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open or make a file with a write-ahead log: readers never wait for a writer.

    Args:
        path: its folder is made where it is missing.
        schema: one statement, CREATE TABLE IF NOT EXISTS.

    Raises:
        sqlite3.Error: the file is no database, or another process held it for a minute.
        OSError: it cannot be opened or made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One thread after another: a notebook's asks in another thread than the one that opened the file.
    connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(schema)
        except sqlite3.Error as error:
            # Of two processes that make the same file, one is told at once that it is locked: each would
            # wait for the other, so SQLite does not wait.
            if "locked" in str(error) and time.monotonic() < deadline:
                time.sleep(_MOMENT)
                continue
            connection.close()
            raise
        return connection


def select(connection: sqlite3.Connection, what: str, keys: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
    """Rows whose `key` is among these keys; `what` names columns and table."""
    rest = iter(keys)
    while some := list(islice(rest, _AT_ONCE)):
        marks = ",".join("?" * len(some))
        yield from connection.execute(f"SELECT {what} WHERE key IN ({marks})", some).fetchall()


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All that is done inside is kept together or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
