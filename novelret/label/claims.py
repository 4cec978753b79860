"""Claims on questions: several processes may ask with one store, and none asks what another is asking.

A claim is a row in the store's file and names its process by a lock file beside it. The process keeps that
locked as long as it lives, so that a kill gives up its claims at once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from novelret.label.store import Store

_SCHEMA = "CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, holder TEXT NOT NULL) WITHOUT ROWID"


class Claims:
    """This process's claims on questions of a store."""

    def __init__(self, store: Store) -> None:
        """Make the lock file; where files cannot be locked (not Unix), every claim is granted."""
        self.store = store
        store.connection.execute(_SCHEMA)
        self.holder = f"{store.path.name}-asking-{uuid.uuid4().hex[:12]}"
        self.lock = _lock(self._file_of(self.holder), create=True)
        for (holder,) in store.connection.execute("SELECT DISTINCT holder FROM claims").fetchall():
            if not self._lives(holder):
                self._forget(holder)

    def take(self, keys: list[bytes]) -> set[bytes]:
        """Claim questions until this process ends; those that no other living process holds.

        Args:
            keys: a few hundred at most.
        """
        if self.lock is None:
            return set(keys)
        with self.store.transaction() as connection:
            marks = ",".join("?" * len(keys))
            found = connection.execute(f"SELECT key, holder FROM claims WHERE key IN ({marks})", keys)
            held = {key: holder for key, holder in found if holder != self.holder}
            living = {holder for holder in set(held.values()) if self._lives(holder)}
            free = {key for key in keys if held.get(key) not in living}
            rows = [(key, self.holder) for key in free]
            connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?)", rows)
            return free

    def give_up(self, keys: Iterable[bytes]) -> None:
        """Leave questions to others."""
        rows = [(key, self.holder) for key in keys]
        if self.lock is not None and rows:
            with self.store.transaction() as connection:
                connection.executemany("DELETE FROM claims WHERE key = ? AND holder = ?", rows)

    def _forget(self, holder: str) -> None:
        with self.store.transaction() as connection:
            connection.execute("DELETE FROM claims WHERE holder = ?", (holder,))

    def _lives(self, holder: str) -> bool:
        path = self._file_of(holder)
        lock = _lock(path)
        if lock is None:
            return path.exists()
        os.close(lock)
        path.unlink(missing_ok=True)  # of a process that was killed
        return False

    def _file_of(self, holder: str) -> Path:
        return self.store.path.with_name(holder)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is not None:
            with contextlib.suppress(sqlite3.Error):  # a full disk; without the lock they mean nothing
                self._forget(self.holder)
            self._file_of(self.holder).unlink(missing_ok=True)
            os.close(self.lock)


def _lock(path: Path, *, create: bool = False) -> int | None:
    """A handle on the file, locked; None where another process holds it, or there is none to lock."""
    try:
        import fcntl
    except ImportError:  # not Unix
        return None
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            if create:  # a disk that knows no locks
                path.unlink(missing_ok=True)
            return None
        return handle
    return None
