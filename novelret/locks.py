"""Locks on files, which a kill frees: they are held by a process as long as it has the file open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def try_lock(handle: int) -> bool | None:
    """Lock an open file (or folder) until it is closed.

    Returns:
        True where it is locked, False where another process (or another handle) holds it, None where there
        are no locks: not Unix, or a file system that knows none.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file still lies at its path: who held it may have renamed or removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False
