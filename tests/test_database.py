"""SQLite files that several processes use at once."""

import sqlite3
import threading
from contextlib import closing

import pytest

from novelret.database import open_database, transaction

SCHEMA = "CREATE TABLE IF NOT EXISTS numbers (number INTEGER)"


def test_a_file_that_another_is_making_is_waited_for(tmp_path):
    path = tmp_path / "file"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with closing(sqlite3.connect(path, timeout=60)) as plain, pytest.raises(sqlite3.OperationalError):
            plain.execute("PRAGMA journal_mode = WAL")  # SQLite itself does not wait here
        done = threading.Timer(0.2, other.execute, ("COMMIT",))
        done.start()
        with closing(open_database(path, SCHEMA)) as database:
            assert database.execute("SELECT count(*) FROM numbers").fetchone() == (0,)
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        done.join()


def test_what_is_no_database_is_not_waited_for(tmp_path):
    path = tmp_path / "file"
    path.write_text("no database " * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_database(path, SCHEMA)


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    def fail(database):
        with transaction(database):
            database.execute("INSERT INTO numbers VALUES (1)")
            raise ZeroDivisionError

    with closing(open_database(tmp_path / "file", SCHEMA)) as database:
        with pytest.raises(ZeroDivisionError):
            fail(database)
        assert database.execute("SELECT count(*) FROM numbers").fetchone() == (0,)
