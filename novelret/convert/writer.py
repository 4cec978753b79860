"""A BEIR folder under construction: rows go straight to disk, what is left out is counted by its reason.

A conversion that was killed goes on after the items, if these were complete: they are what takes long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from novelret.artifacts import (
    Manifest,
    check_output,
    drop_partial,
    fingerprint_of,
    fsync_file,
    open_output,
    read_json,
    write_json,
    write_manifest,
)
from novelret.data.catalog import read_id
from novelret.data.source import quoted
from novelret.errors import UserError

_RECENT = 500_000
_HEADER = "query-id\tcorpus-id\tscore\n"


@dataclass(frozen=True)
class Converted:
    """What a conversion gave.

    Attributes:
        folder: the BEIR folder.
        items: items written.
        queries: queries written.
        pairs: split → pairs written.
        dropped: reason → how many rows of the source were left out for it.
    """

    folder: Path
    items: int
    queries: int
    pairs: dict[str, int]
    dropped: dict[str, int]


class Hashes:
    """A set of strings in 8 bytes each: two of 30 million collide with a chance of 1 in 40,000."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, string: str) -> bool:
        """Add a string; says whether it is new."""
        value = hash64(string)
        if self._has(value):
            return False
        self._recent.add(value)
        if len(self._recent) == _RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=_RECENT)
            self._sorted = np.sort(np.concatenate([self._sorted, recent]), kind="stable")
            self._recent = set()
        return True

    def __contains__(self, string: str) -> bool:
        return self._has(hash64(string))

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def save(self, path: Path) -> None:
        """Write the set to an .npy file."""
        recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
        np.save(path, np.sort(np.concatenate([self._sorted, recent])))

    @staticmethod
    def load(path: Path) -> Hashes:
        """The set that `save` wrote."""
        hashes = Hashes()
        hashes._sorted = np.load(path)
        return hashes

    def _has(self, value: int) -> bool:
        if value in self._recent:
            return True
        place = int(self._sorted.searchsorted(np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value


class Texts:
    """Ids with a hash of each one's text, 16 bytes an id: the same id with another text is noticed."""

    def __init__(self) -> None:
        self._ids, self._pairs = Hashes(), Hashes()

    def add(self, where: str, kind: str, identity: str, text: str) -> bool:
        """Add the text of a "query" or an "item"; says whether its id is new.

        Raises:
            UserError: the id came with another text before.
        """
        new_id, new_pair = self._ids.add(identity), self._pairs.add(f"{identity}\t{text}")
        if new_pair and not new_id:
            raise UserError(
                f"{where}: {kind} id {identity!r} came with another text before; "
                "give each text an id of its own, or keep one"
            )
        return new_id


def hash64(string: str) -> int:
    """The same 64 bits for a string on every machine and in every run."""
    data = string.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Writer:
    """Appends items, queries and pairs to the files of a BEIR folder."""

    def __init__(self, folder: Path, splits: tuple[str, ...], stack: contextlib.ExitStack) -> None:
        """Open all files; a split that gets no pairs is an empty one, not a missing one."""
        self.items, self.queries = 0, 0
        self.pairs: Counter[str] = Counter(dict.fromkeys(splits, 0))
        self.dropped: Counter[str] = Counter()
        self._folder, self._stack = folder, stack
        self._progress = folder / "progress.json"
        self._corpus: TextIO
        if self._progress.is_file():
            before = read_json(self._progress)
            self.items = before["items"]
            self.dropped.update(before["dropped"])
            self._corpus = stack.enter_context((folder / "corpus.jsonl").open("a", encoding="utf-8"))
        else:
            self._corpus = self._open("corpus.jsonl")
        self._queries = self._open("queries.jsonl")
        self._qrels = {split: self._open(f"qrels/{split}.tsv", _HEADER) for split in splits}
        self._excluded: dict[str, TextIO] = {}

    def item(self, where: str, item_id: str, title: str, text: str) -> None:
        """Write one item; ids must be distinct and texts not empty, which the caller sees to."""
        read_id(where, {"_id": item_id})  # refuses what `index` would refuse
        self.items += 1
        self._corpus.write(_line({"_id": item_id, "title": title, "text": text}))

    def keep_items(self, written: Hashes, left_out: Hashes) -> None:
        """Note that all items are written; a conversion that is killed later goes on from here."""
        self._corpus.flush()
        fsync_file(self._folder / "corpus.jsonl")
        written.save(self._folder / "written.npy")
        left_out.save(self._folder / "left-out.npy")
        write_json(self._progress, {"items": self.items, "dropped": dict(self.dropped)})

    def kept_items(self) -> tuple[Hashes, Hashes] | None:
        """Ids written and left out, if a conversion that was killed had written all items."""
        if not self._progress.is_file():
            return None
        return Hashes.load(self._folder / "written.npy"), Hashes.load(self._folder / "left-out.npy")

    def query(self, where: str, query_id: str, text: str) -> None:
        """Write one query; ids must be distinct and texts not empty, which the caller sees to."""
        read_id(where, {"_id": query_id})
        self.queries += 1
        self._queries.write(_line({"_id": query_id, "text": text}))

    def pair(self, split: str, query_id: str, item_id: str, score: float = 1) -> None:
        """Write one line of feedback."""
        self.pairs[split] += 1
        # All digits: `g` would keep six of them.
        number = str(int(score)) if float(score).is_integer() else repr(float(score))
        self._qrels[split].write(f"{quoted(query_id)}\t{quoted(item_id)}\t{number}\n")

    def exclude(self, split: str, query_id: str, item_id: str) -> None:
        """Leave an item out of a query's rankings."""
        if split not in self._excluded:
            self._excluded[split] = self._open(f"excluded/{split}.tsv", _HEADER)
        self._excluded[split].write(f"{quoted(query_id)}\t{quoted(item_id)}\t1\n")

    def drop(self, reason: str) -> None:
        """Count what is left out."""
        self.dropped[reason] += 1

    def _open(self, name: str, header: str = "") -> TextIO:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        file = self._stack.enter_context(path.open("w", encoding="utf-8"))
        file.write(header)
        return file


@contextlib.contextmanager
def open_writer(
    out: Path,
    source: str,
    settings: dict[str, Any],
    files: list[Path],
    splits: tuple[str, ...],
    *,
    force: bool,
) -> Iterator[Writer]:
    """Give a writer whose folder appears as `out` when the block ends well.

    Raises:
        UserError: a split's name is unusable, a source file is missing, or `out` exists and `force` is off.
    """
    check_splits(splits)
    check_output(out, force=force, kind="data", inputs=[str(path) for path in files])
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    # Sizes and times instead of hashes: the sources are up to 22 GB, and nothing is taken over from them.
    inputs = {str(path): f"{path.stat().st_size}-{path.stat().st_mtime_ns}" for path in files}
    identity = fingerprint_of(source, settings, inputs)
    with open_output(out, identity, force=force) as folder:
        try:
            with contextlib.ExitStack() as stack:
                writer = Writer(folder, splits, stack)
                yield writer
            _check_not_empty(writer, files[0] if files else source)
        except (UserError, OSError):
            drop_partial(folder)  # bad sources and full disks leave nothing behind
            raise
        for name in ("progress.json", "written.npy", "left-out.npy"):
            (folder / name).unlink(missing_ok=True)
        facts = {
            "items": writer.items,
            "queries": writer.queries,
            "pairs": dict(writer.pairs),
            "dropped": dict(writer.dropped),
        }
        config = {"source": source, **{key: str(value) for key, value in settings.items()}}
        write_manifest(folder, Manifest("data", config, inputs, identity, facts))


def check_splits(names: Sequence[str]) -> None:
    """Refuse names that cannot be those of files beside each other, before anything is read or written.

    Raises:
        UserError: a name is empty, repeats, begins with a dot or holds a path separator.
    """
    for place, name in enumerate(names):
        if not name.strip():
            raise UserError("--split: a name is empty; write NAME=… with a name such as train")
        if name.startswith(".") or "/" in name or "\\" in name:
            raise UserError(
                f"--split: the name {name!r} begins with a dot or holds a path separator; it names the file "
                "qrels/NAME.tsv, so choose one such as train"
            )
        if name in names[:place]:
            raise UserError(f"--split: the name {name!r} repeats; give each split a name of its own")


def _check_not_empty(writer: Writer, source: Path | str) -> None:
    if writer.items == 0 or writer.queries == 0:
        raise UserError(
            f"{source}: nothing is left to write ({writer.items} items, {writer.queries} queries; dropped: "
            f"{dict(writer.dropped) or 'nothing'})"
        )


def converted(out: Path, writer: Writer) -> Converted:
    """The writer's counts."""
    return Converted(out, writer.items, writer.queries, dict(writer.pairs), dict(writer.dropped))


def columns_of(where: str, line: str, names: tuple[str, ...], *, rest: bool = False) -> list[str]:
    """The tab-separated columns of a line, stripped.

    Args:
        where: file and line, for messages.
        line: the line.
        names: the expected columns.
        rest: the last column may hold tabs itself.

    Raises:
        UserError: another number of columns.
    """
    columns = line.rstrip("\r\n").split("\t", len(names) - 1 if rest else -1)
    if len(columns) != len(names):
        raise UserError(
            f"{where}: {len(columns)} columns, expected {len(names)} ({', '.join(names)}; tab-separated)"
        )
    return [column.strip() for column in columns]


def _line(row: dict[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
