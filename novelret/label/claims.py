"""Claims on questions: several processes may ask with one store, and none asks what another is asking.

A claim is a row in the store's file and names its process by a lock file beside it. The process keeps that
locked as long as it lives, so that a kill gives up its claims at once.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from novelret.label.store import Store
from novelret.locks import is_at, try_lock

_MOMENT = 0.01  # seconds

_SCHEMA = "CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, holder TEXT NOT NULL) WITHOUT ROWID"


class Claims:
    """This process's claims on questions of a store."""

    def __init__(self, store: Store) -> None:
        """Make the lock file; where files cannot be locked (not Unix), every claim is granted."""
        self.store = store
        store.connection.execute(_SCHEMA)
        self.holder = f"{store.path.name}-asking-{uuid.uuid4().hex[:12]}"
        self.lock = _make_locked(self._file_of(self.holder))
        for (holder,) in store.connection.execute("SELECT DISTINCT holder FROM claims").fetchall():
            if not self._lives(holder):
                self._forget(holder)
        pattern = f"{glob.escape(store.path.name)}-asking-*"
        for path in store.path.parent.glob(pattern):  # of processes that were killed before any claim
            if path.name != self.holder:
                self._lives(path.name)

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
        path.unlink(missing_ok=True)  # of a process that was killed
        os.close(lock)
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


def _lock(path: Path) -> int | None:
    """A handle on the file, locked; None where another process holds it, or there is none to lock."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR)
        if try_lock(handle):
            return handle
        os.close(handle)
    return None


def _make_locked(path: Path) -> int | None:
    """A handle on a new file, locked; None on a disk that knows no locks."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT)
        except OSError:
            return None
        is_locked = try_lock(handle)
        if is_locked and is_at(handle, path):
            return handle
        os.close(handle)
        if is_locked is None:
            path.unlink(missing_ok=True)
            return None
        time.sleep(_MOMENT)  # another process looks whether a kill has left it
