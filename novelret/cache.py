"""Files in an index's cache: lists that are searched part by part, and whatever is written in one piece."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from novelret.locks import is_at, try_lock
from novelret.progress import Reporter

_WAIT = 0.2  # seconds between looks at whether another process is done


def kept_lists(cache: Path, depth: int, *, cut: bool = True) -> tuple[np.ndarray, np.ndarray] | None:
    """The first places of the shortest lists in the cache that are long enough, memory-mapped.

    Without `cut` only lists that are just as long.
    """
    depths = [int(path.stem[5:]) for path in cache.glob("rows-*.npy") if path.stem[5:].isdigit()]
    longer = min((kept for kept in depths if kept == depth or (cut and kept > depth)), default=None)
    if longer is None:
        return None
    rows, scores = (np.load(cache / f"{what}-{longer}.npy", mmap_mode="r") for what in ("rows", "scores"))
    return np.asarray(rows)[:, :depth], np.asarray(scores)[:, :depth]


def keep_lists(
    cache: Path,
    search: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]],
    shape: tuple[int, int],
    dtype: type[np.signedinteger],
    report: Reporter,
) -> None:
    """Write lists part by part: all of them may be more than memory holds.

    Goes on after the last whole list that a killed run left. Of several processes one searches, and the
    others wait for it.

    Args:
        cache: the folder; made where it is missing.
        search: how many queries are done → the rows and the scores of the others, in parts of (n, depth).
        shape: (Q, depth).
        dtype: of the rows.
        report: for the note that another process is at it.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    cache.mkdir(parents=True, exist_ok=True)
    drop_stale(cache)
    kept = [cache / f"{what}-{shape[1]}.npy" for what in ("rows", "scores")]
    partial = [path.with_name(path.name + ".partial") for path in kept]
    try:
        with _held(partial[0], report) as rows:
            if kept[0].is_file():  # another process has found them meanwhile
                partial[0].unlink(missing_ok=True)
                return
            with _opened(partial[1]) as scores:
                _fill([(rows, np.dtype(dtype)), (scores, np.dtype(np.float64))], search, shape)
            for path, name in zip(reversed(partial), reversed(kept), strict=True):
                path.replace(name)  # rows come last: where they are, both are
    except OSError:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


@contextlib.contextmanager
def _held(path: Path, report: Reporter) -> Iterator[BinaryIO]:
    """A file that no other process holds; waits until that is so."""
    told = False
    while True:
        with _opened(path) as file:
            is_locked = try_lock(file.fileno())
            if is_locked is None or (is_locked and is_at(file.fileno(), path)):
                yield file
                return
        if is_locked is False:
            if not told:
                report.note("another novelret searches the same lists; waiting for it")
            told = True
            time.sleep(_WAIT)


def _opened(path: Path) -> BinaryIO:
    path.touch()
    return path.open("r+b")


def _fill(
    files: list[tuple[BinaryIO, np.dtype]],
    search: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]],
    shape: tuple[int, int],
) -> None:
    """Write what is missing of .npy files, one list after the other."""
    starts, done = [], shape[0]
    for file, dtype in files:
        header = _header(dtype, shape)
        size = file.seek(0, os.SEEK_END)
        starts.append(len(header))
        done = min(done, max(0, size - len(header)) // (shape[1] * dtype.itemsize))
        file.seek(0)
        file.write(header)
    for (file, dtype), start in zip(files, starts, strict=True):
        file.seek(start + done * shape[1] * dtype.itemsize)
    for part in search(done):
        for (file, dtype), found in zip(files, part, strict=True):
            file.write(found.astype(dtype, copy=False).tobytes())
            file.flush()


def _header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all, also where several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_stale(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_stale(cache: Path) -> None:
    """Remove each NAME.PID.tmp of a process that is no more, as far as this machine can tell."""
    for path in cache.glob("*.*.tmp"):
        number = path.name.split(".")[-2]
        if number.isdigit() and not _is_alive(int(number)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no process number
        return True
    return True
