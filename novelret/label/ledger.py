"""Which questions lie in which batch: kept in the store's file, so that a kill forgets nothing sent."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from novelret.label.store import Store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS submissions (
    id TEXT PRIMARY KEY,
    judge TEXT NOT NULL,
    batch TEXT,
    requests INTEGER NOT NULL,
    cost REAL NOT NULL,
    time TEXT NOT NULL,
    run TEXT,
    endpoint TEXT
);
CREATE TABLE IF NOT EXISTS spent (
    run TEXT PRIMARY KEY,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked (
    key BLOB PRIMARY KEY,
    submission TEXT,
    attempts INTEGER NOT NULL,
    failure TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS asked_in ON asked (submission)
"""
_ATTEMPTS = 3  # batches that a question may lie in before it counts as failed
_LOCK_WAIT = 30.0  # seconds


@dataclass(frozen=True)
class Submission:
    """A batch of questions that has not been settled yet.

    Attributes:
        id: ours, also in the batch's metadata.
        batch: the endpoint's id; None where it is not known whether the batch was made.
        requests: how many questions.
        cost: dollars that they may cost at most.
        run: who submitted it and pays for it; None for one that an older novelret submitted.
        endpoint: where it was sent; None for one that an older novelret sent.
    """

    id: str
    batch: str | None
    requests: int
    cost: float
    run: str | None
    endpoint: str | None


class Spending(NamedTuple):
    """What replies in batches have cost.

    Attributes:
        requests: replies delivered.
        prompt_tokens: of those that tell their tokens.
        completion_tokens: likewise.
        cost: dollars for the others, the most that they can cost.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class Ledger:
    """The open submissions of one judge, and the questions in them."""

    def __init__(self, store: Store, judge: str) -> None:
        """Open the ledger in a store's file."""
        self._store, self._judge = store, judge
        for statement in _SCHEMA.split(";"):
            store.connection.execute(statement)
        columns = [row[1] for row in store.connection.execute("PRAGMA table_info(submissions)")]
        for name in {"run", "endpoint"} - set(columns):  # the file is of an older novelret
            with contextlib.suppress(sqlite3.OperationalError):  # another process has just added it
                store.connection.execute(f"ALTER TABLE submissions ADD COLUMN {name} TEXT")

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Keep other processes from submitting meanwhile; a kill frees it.

        Gives False where another process does not let go: nothing is locked then.
        """
        # A file of its own: answers of other judges may come in while this one submits.
        path = self._store.path.with_name(self._store.path.name + ".lock")
        with contextlib.closing(
            sqlite3.connect(path, timeout=_LOCK_WAIT, isolation_level=None)
        ) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                yield False
                return
            yield True

    def open(self) -> list[Submission]:
        """All submissions that are not settled."""
        rows = self._store.connection.execute(
            "SELECT id, batch, requests, cost, run, endpoint FROM submissions WHERE judge = ? ORDER BY time",
            (self._judge,),
        )
        return [Submission(*row) for row in rows]

    def states(self, keys: Iterable[bytes]) -> dict[bytes, tuple[str | None, str | None]]:
        """(submission, failure) of those that lay in a batch; two Nones where one may be asked again."""
        rows = self._store.select("key, submission, failure FROM asked", keys)
        return {key: (submission, failure) for key, submission, failure in rows}

    def holds_others(self, submissions: set[str]) -> bool:
        """Whether a question failed, or lies in a submission that is none of these."""
        if not submissions.issuperset(submission.id for submission in self.open()):
            return True
        one = self._store.connection.execute("SELECT 1 FROM asked WHERE failure IS NOT NULL LIMIT 1")
        return one.fetchone() is not None

    def under_way(self, keys: Iterable[bytes]) -> set[bytes]:
        """Which of these questions lie in a batch that is not settled, whoever submitted it."""
        rows = self._store.select("key, submission FROM asked", keys)
        return {key for key, submission in rows if submission is not None}

    def begin(self, submission: Submission, keys: Iterable[bytes]) -> None:
        """Note what is about to be sent; before it is sent."""
        time = datetime.now(UTC).isoformat()
        with self._store.transaction() as connection:
            connection.execute(
                "INSERT INTO submissions (id, judge, requests, cost, time, run, endpoint) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    submission.id,
                    self._judge,
                    submission.requests,
                    submission.cost,
                    time,
                    submission.run,
                    submission.endpoint,
                ),
            )
            connection.executemany(
                "INSERT INTO asked VALUES (?, ?, 0, NULL) "
                "ON CONFLICT (key) DO UPDATE SET submission = excluded.submission",
                [(key, submission.id) for key in keys],
            )

    def record(self, submission: str, batch: str) -> None:
        """Note the batch that a submission became."""
        self._store.connection.execute("UPDATE submissions SET batch = ? WHERE id = ?", (batch, submission))

    def drop(self, submission: str) -> None:
        """Forget a submission that never became a batch or did nothing; its questions may be asked again."""
        with self._store.transaction() as connection:
            connection.execute("UPDATE asked SET submission = NULL WHERE submission = ?", (submission,))
            connection.execute(
                "DELETE FROM asked WHERE submission IS NULL AND attempts = 0 AND failure IS NULL"
            )
            connection.execute("DELETE FROM submissions WHERE id = ?", (submission,))

    def keys_in(self, submission: str) -> set[bytes]:
        """The questions in a submission."""
        rows = self._store.connection.execute("SELECT key FROM asked WHERE submission = ?", (submission,))
        return {key for (key,) in rows}

    def settle(
        self,
        submission: str,
        answered: Iterable[bytes],
        failed: dict[bytes, str],
        run: str,
        spending: Spending,
    ) -> None:
        """Close a submission.

        Args:
            submission: its id.
            answered: questions whose answers are stored.
            failed: questions that cannot be answered → why. The rest may be asked again, some times.
            run: who pays for it.
            spending: what it cost; kept until that run takes note of it.
        """
        sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in Spending._fields)
        with self._store.transaction() as connection:
            connection.execute(
                f"INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET {sums}",
                (run, *spending),
            )
            connection.executemany("DELETE FROM asked WHERE key = ?", [(key,) for key in answered])
            connection.executemany(
                "UPDATE asked SET submission = NULL, failure = ? WHERE key = ?",
                [(reason, key) for key, reason in failed.items()],
            )
            connection.execute(
                "UPDATE asked SET submission = NULL, attempts = attempts + 1 WHERE submission = ?",
                (submission,),
            )
            connection.execute(
                "UPDATE asked SET failure = ? WHERE attempts >= ? AND failure IS NULL",
                (f"no answer in {_ATTEMPTS} batches", _ATTEMPTS),
            )
            connection.execute("DELETE FROM submissions WHERE id = ?", (submission,))

    def spent(self, run: str) -> Spending | None:
        """What a run's batches have cost since it last took note, whoever settled them."""
        row = self._store.connection.execute(
            f"SELECT {', '.join(Spending._fields)} FROM spent WHERE run = ?", (run,)
        ).fetchone()
        return Spending(*row) if row else None

    def forget_spent(self, run: str) -> None:
        """The run has taken note of what its batches cost."""
        self._store.connection.execute("DELETE FROM spent WHERE run = ?", (run,))

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let failed questions be asked again: the user has been told of them."""
        with self._store.transaction() as connection:
            connection.executemany("DELETE FROM asked WHERE key = ?", [(key,) for key in keys])
