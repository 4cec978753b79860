"""The catalog: item ids and texts in one memory-mapped Arrow file; 30 million items cost no memory."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from novelret.data.source import read_part
from novelret.errors import UserError
from novelret.progress import Reporter

SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
_BATCH = 65_536
_BATCHES = 8  # of pairs that share a pass over the ids, some hundred MB of them
_LOOKED_UP = 1 << 23  # items at a time, of which 12 bytes each are held


@dataclass(frozen=True)
class Catalog:
    """Item ids and texts by row; row r is also row r of the embeddings.

    Attributes:
        ids: N strings.
        texts: N strings, the title and the text joined by a space.
    """

    ids: pa.ChunkedArray
    texts: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Rows of item ids: int64, −1 where an id is not in the catalog.

        Hashes the given ids, not the catalog's, and streams over the catalog.
        """
        wanted = pa.array(ids, pa.large_string())
        unique = wanted.unique()
        row_of_unique = np.full(len(unique), -1, dtype=np.int64)
        # Each call hashes the ids anew: about many chunks at once, and not all, for the memory of its reply.
        for start in range(0, len(self.ids), _LOOKED_UP):
            place = pc.index_in(self.ids.slice(start, _LOOKED_UP), value_set=unique)
            position = place.fill_null(-1).to_numpy()
            found = np.flatnonzero(position >= 0)
            row_of_unique[position[found]] = found + start
        pa.default_memory_pool().release_unused()  # the hash tables of each pass, else kept for the next
        return row_of_unique[pc.index_in(wanted, value_set=unique).to_numpy(zero_copy_only=False)]

    def ids_at(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Ids of the given rows."""
        ids: list[str] = take_rows(self.ids, rows).to_pylist()
        return ids

    def texts_at(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Texts of the given rows."""
        texts: list[str] = take_rows(self.texts, rows).to_pylist()
        return texts


def rows_of_pairs(
    batches: Iterable[pa.RecordBatch], query_ids: list[str], catalog: Catalog
) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Table]]:
    """Lines about some queries, with their ids as rows; several batches share a pass over the catalog's ids.

    Args:
        batches: with columns query_id and item_id, some hundred thousand lines each.
        query_ids: the queries, in row order; lines of others are passed over.
        catalog: the indexed items.

    Returns:
        (n,) int64 query rows, (n,) int64 catalog rows, −1 where there is no such item, and the n lines.
    """
    wanted, rest = pa.array(query_ids, pa.string()), iter(batches)
    while some := list(islice(rest, _BATCHES)):
        lines = pa.Table.from_batches(some)
        query_rows = pc.index_in(lines["query_id"], value_set=wanted)
        kept = query_rows.is_valid()
        lines = lines.filter(kept)
        item_rows = catalog.rows_of(lines["item_id"].cast(pa.large_string()).combine_chunks())
        yield query_rows.filter(kept).to_numpy().astype(np.int64), item_rows, lines


def take_rows(column: pa.ChunkedArray, rows: np.ndarray | Sequence[int]) -> pa.Array:
    """Values of a column at the given rows, in their order; rows may repeat.

    `ChunkedArray.take` first puts all chunks together, which copies the whole column at each call.

    Raises:
        IndexError: a row is not in the column.
    """
    rows = np.asarray(rows, dtype=np.int64)
    ends = np.cumsum([len(chunk) for chunk in column.chunks], dtype=np.int64)
    chunk_of = np.searchsorted(ends, rows, side="right")
    order = np.argsort(chunk_of, kind="stable")
    numbers, firsts = np.unique(chunk_of[order], return_index=True)
    found = [pa.array([], column.type)]
    for number, of in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=False):
        chunk = column.chunk(number)
        found.append(chunk.take(pa.array(rows[of] - (ends[number] - len(chunk)))))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(found).take(pa.array(back))


def open_catalog(path: Path) -> Catalog:
    """Memory-map a catalog file."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not readable as a catalog ({error}); run `novelret index` again") from None
    return Catalog(table["id"], table["text"])


def write_catalog(data: str, path: Path, report: Reporter | None = None) -> None:
    """Stream a corpus into a catalog file.

    Args:
        data: a BEIR folder or a Hugging Face data set.
        path: the file to write; it appears when it is whole.
        report: for a bar, and a warning where no item has a text, but a title.

    Raises:
        UserError: a row has no id or no text, an id occurs twice, or there are no items.
    """
    temporary = path.with_suffix(".tmp")
    hashes: list[np.ndarray] = []
    report = report or Reporter()
    has_texts = False
    with (
        report.bar("reading the catalog") as advance,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for ids, texts, some_have_texts in _batches(data):
            writer.write_batch(pa.record_batch([ids, texts], schema=SCHEMA))
            hashes.append(np.fromiter((hash(i) for i in ids), dtype=np.int64, count=len(ids)))
            has_texts |= some_have_texts
            advance(len(ids))
    if not hashes:
        raise UserError(f"{data}: the corpus holds no items")
    if not has_texts:
        report.warn(f"{data}: no item has a `text`; their titles are all that is read")
    _check_unique(data, np.concatenate(hashes))
    temporary.replace(path)


def reorder_catalog(path: Path, rows: np.ndarray) -> None:
    """Put a catalog file into another order: its new row n is its old row rows[n]."""
    catalog = open_catalog(path)
    temporary = path.with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            columns = [take_rows(catalog.ids, some), take_rows(catalog.texts, some)]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    temporary.replace(path)


def id_ranks(catalog: Catalog) -> np.ndarray:
    """Rank of each item's id in ascending order (int32, or int64 from 2³¹ items): the tie rule's key."""
    order = pc.sort_indices(catalog.ids).to_numpy()
    ranks = np.empty(len(order), dtype=np.int32 if len(order) < 2**31 else np.int64)
    ranks[order] = np.arange(len(order), dtype=ranks.dtype)
    return ranks


def _batches(data: str) -> Iterator[tuple[list[str], list[str], bool]]:
    """Ids, titles and texts joined, and whether there are texts among them."""
    ids: list[str] = []
    texts: list[str] = []
    has_texts = False
    for where, row in read_part(data, "corpus"):
        item_id = read_id(where, row)
        own = read_text(where, row, "text")
        text = f"{read_text(where, row, 'title')} {own}".strip()
        has_texts |= own != ""
        if not text:
            raise UserError(
                f"{where}: item {item_id!r} has neither title nor text; drop it or give it a text"
            )
        ids.append(item_id)
        texts.append(text)
        if len(ids) == _BATCH:
            yield ids, texts, has_texts
            ids, texts = [], []
    if ids:
        yield ids, texts, has_texts


def read_id(where: str, row: dict[str, object]) -> str:
    """A row's id as a string.

    Raises:
        UserError: there is none, it is neither string nor number, or it holds white space, which run files
            and qrels cannot carry.
    """
    text = plain_text(where, "_id", row.get("_id"))
    if not text:
        raise UserError(f"{where}: no _id")
    if text.isprintable() and " " not in text:
        return text
    # Joiners between letters are not printable either, and words of many scripts hold them.
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise UserError(f"{where}: the _id {text!r} holds control characters")
    if any(letter.isspace() for letter in text):
        raise UserError(f"{where}: the _id {text!r} holds a space, at which run files are cut; replace it")
    return text


def read_text(where: str, row: dict[str, object], name: str) -> str:
    """A row's title or text as a string, empty where there is none.

    Raises:
        UserError: it is neither string nor number.
    """
    return plain_text(where, name, row.get(name))


def plain_text(where: str, name: str, value: object) -> str:
    """A value as a string, empty where there is none: None, or NaN, which tables have in empty cells.

    Raises:
        UserError: it is neither string nor number.
    """
    if type(value) is str:  # nearly always, of up to 30 million
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | Number):
        raise UserError(
            f"{where}: the {name} is of type {type(value).__name__}; make it a string, or a number"
        )
    return str(value)


def _check_unique(data: str, hashes: np.ndarray) -> None:
    # 8 bytes per item instead of a set of strings; only suspects are read a second time.
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for where, row in read_part(data, "corpus"):
        item_id = read_id(where, row)
        if hash(item_id) in suspects:
            count[item_id] += 1
            if count[item_id] == 2:
                raise UserError(f"{where}: duplicate _id {item_id!r}, seen before at {first[item_id]}")
            first[item_id] = where
