"""A split: its queries, and the feedback of those that have any as rows of the catalog."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from novelret.artifacts import fingerprint_array, fingerprint_of, fingerprint_strings
from novelret.data.catalog import Catalog, read_id, read_text
from novelret.data.source import (
    qrels_name,
    read_excluded,
    read_part,
    read_qrels,
    read_split_blocks,
    read_unclicked,
)
from novelret.errors import UserError
from novelret.row_lists import RowLists, row_lists


@dataclass(frozen=True)
class Split:
    """Queries with their positive feedback; some may have none (see `read_unclicked`).

    Attributes:
        name: the split's name ("train", "test", …).
        query_ids: Q ids, in the order of the queries file.
        query_texts: Q texts.
        feedback_queries: (P,) int64, row of each pair's query; ascending.
        feedback_items: (P,) int64, catalog row of each pair's item; ascending within a query.
        excluded: the catalog rows that are left out of each query's rankings.
        fingerprint: identity of all of this.
    """

    name: str
    query_ids: list[str]
    query_texts: list[str]
    feedback_queries: np.ndarray
    feedback_items: np.ndarray
    excluded: RowLists
    fingerprint: str

    def __len__(self) -> int:
        return len(self.query_ids)

    @cached_property
    def searched(self) -> str:
        """Identity of what lists depend on, texts and what is left out: more feedback changes none."""
        return fingerprint_of(
            fingerprint_strings(self.query_texts),
            fingerprint_array(self.excluded.starts),
            fingerprint_array(self.excluded.rows),
        )

    @property
    def clicked(self) -> int:
        """How many queries have feedback."""
        return len(np.unique(self.feedback_queries))

    def subset(self, rows: np.ndarray) -> Split:
        """The split restricted to some of its queries, given by ascending row."""
        new_row = np.full(len(self), -1, dtype=np.int64)
        new_row[rows] = np.arange(len(rows))
        kept = new_row[self.feedback_queries] >= 0
        return make_split(
            self.name,
            [self.query_ids[r] for r in rows],
            [self.query_texts[r] for r in rows],
            new_row[self.feedback_queries[kept]],
            self.feedback_items[kept],
            self.excluded.take(rows),
        )

    def with_items(self, translated: Callable[[np.ndarray], np.ndarray]) -> Split:
        """The split with its items as rows of a catalog of the same items in another order."""
        return make_split(
            self.name,
            self.query_ids,
            self.query_texts,
            self.feedback_queries,
            translated(self.feedback_items),
            RowLists(self.excluded.starts, translated(self.excluded.rows)),
        )


def make_split(
    name: str,
    query_ids: list[str],
    query_texts: list[str],
    feedback_queries: np.ndarray,
    feedback_items: np.ndarray,
    excluded: RowLists,
) -> Split:
    """Put a split together: sort its feedback, drop repeated pairs, fingerprint it."""
    width = int(feedback_items.max(initial=0)) + 1
    keys = np.sort(feedback_queries * np.int64(width) + feedback_items)  # faster than np.unique, which hashes
    keys = keys[np.diff(keys, prepend=-1) > 0]
    queries, items = keys // width, keys % width
    fingerprint = fingerprint_of(
        name,
        fingerprint_strings(query_ids),
        fingerprint_strings(query_texts),
        fingerprint_array(queries),
        fingerprint_array(items),
        fingerprint_array(excluded.starts),
        fingerprint_array(excluded.rows),
    )
    return Split(name, query_ids, query_texts, queries, items, excluded, fingerprint)


def load_split(data: str, split: str, catalog: Catalog, *, ignore_identical_ids: bool = True) -> Split:
    """Read a split's qrels, the queries they name, and those that unclicked/SPLIT.tsv adds.

    Args:
        data: a BEIR folder or a Hugging Face data set.
        split: name of the qrels file or of the data set's split.
        catalog: the indexed items.
        ignore_identical_ids: leave the item whose id is the query's own out of its rankings and of its
            feedback, as BEIR does. What excluded/SPLIT.tsv lists is left out of both, too.

    Raises:
        UserError: a line names an unknown query or item, a query has no text, an id occurs twice,
            no pair with a positive score is left, or no line of excluded/SPLIT.tsv is about both the
            split's queries and the catalog's items.
    """
    query_ids, item_ids, queries, items = _read_pairs(data, split, ignore_identical_ids=ignore_identical_ids)
    if not query_ids:
        other = " and another item than the query itself" if ignore_identical_ids else ""
        raise UserError(
            f"{qrels_name(data, split)}: split {split!r} has no pairs; these need a score above 0{other}"
        )
    unclicked = {query_id: where for where, query_id in read_unclicked(data, split)}
    texts = load_queries(data, [*query_ids, *unclicked])
    row_of = {query_id: row for row, query_id in enumerate(texts)}
    for query_id in (*query_ids, *unclicked):
        if query_id not in row_of:
            where = unclicked.get(query_id) or _first_line(data, split, query_id=query_id)
            raise UserError(f"{where}: query id {query_id!r} is not in the queries file")
    item_rows = catalog.rows_of(item_ids)
    missing = np.flatnonzero(item_rows < 0)
    if len(missing):
        item_id = item_ids[missing[0]]
        lines = int(np.isin(items, missing).sum())
        raise UserError(
            f"{_first_line(data, split, item_id=item_id)}: item id {item_id!r} is not in the catalog "
            f"({lines} such line{'s' if lines > 1 else ''}); leave them out, or index the item"
        )
    query_rows = np.array([row_of[query_id] for query_id in query_ids], dtype=np.int64)
    queries, items = query_rows[queries], item_rows[items]
    ids = list(texts)
    excluded = _excluded(data, split, row_of, catalog, ignore_identical_ids=ignore_identical_ids)
    kept = ~np.isin(queries * len(catalog) + items, excluded.pairs(len(catalog)))
    if not kept.any():
        raise UserError(f"{qrels_name(data, split)}: excluded/{split}.tsv leaves out all pairs of {split!r}")
    return make_split(split, ids, list(texts.values()), queries[kept], items[kept], excluded)


def _read_pairs(
    data: str, split: str, *, ignore_identical_ids: bool
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Query ids and item ids in the order they first came, and the pairs as numbers of both.

    A pair is held in eight bytes a number, however long the ids are.
    """
    queries: dict[str, int] = {}
    items: dict[str, int] = {}
    parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
    for block in read_split_blocks(data, split):
        kept = pc.greater(block["score"], 0)
        if ignore_identical_ids:
            kept = pc.and_(kept, pc.not_equal(block["query_id"], block["item_id"]))
        block = block.filter(kept)
        parts.append((_numbers(block["query_id"], queries), _numbers(block["item_id"], items)))
    query_numbers, item_numbers = map(np.concatenate, zip(*parts, strict=True))
    return list(queries), list(items), query_numbers, item_numbers


def _numbers(ids: pa.Array, numbers: dict[str, int]) -> np.ndarray:
    """Each id's number; new ids get the next ones."""
    found = ids.dictionary_encode()
    own = [numbers.setdefault(identity, len(numbers)) for identity in found.dictionary.to_pylist()]
    return np.array(own, dtype=np.int64)[found.indices.to_numpy()]


def _first_line(data: str, split: str, *, query_id: str | None = None, item_id: str | None = None) -> str:
    """Where the qrels first call an item relevant to this query, or this item; only messages need it."""
    return next(
        where
        for where, query, item, score in read_qrels(data, split)
        if score > 0 and (query == query_id or item == item_id)
    )


def _excluded(
    data: str, split: str, row_of: dict[str, int], catalog: Catalog, *, ignore_identical_ids: bool
) -> RowLists:
    """Each query's own item, if it may not be ranked, and what excluded/SPLIT.tsv leaves out."""
    numbers: dict[str, int] = {}
    queries, items = array("q"), array("q")
    scores, first = array("d"), ""
    for where, query_id, item_id, score in read_excluded(data, split):
        first = first or where
        if query_id in row_of:
            queries.append(row_of[query_id])
            items.append(numbers.setdefault(item_id, len(numbers)))
            scores.append(score)
    own = catalog.rows_of(list(row_of)) if ignore_identical_ids else np.empty(0, dtype=np.int64)
    listed = catalog.rows_of(list(numbers))[np.asarray(items)]
    if first and not (listed >= 0).any():
        raise UserError(
            f"{first}: neither this nor a later line names a query of split {split!r} and an item of the "
            "catalog; write their ids as queries and corpus have them, or remove the file"
        )
    listed[np.asarray(scores) <= 0] = -1
    query = np.concatenate([np.arange(len(own)), np.asarray(queries)])
    rows = np.concatenate([own, listed])
    return row_lists(query[rows >= 0], rows[rows >= 0], len(row_of))


def plain_texts(texts: list[str]) -> list[str]:
    """Texts without what makes no other query of them: case and white space."""
    return [" ".join(text.split()).casefold() for text in texts]


def load_queries(data: str, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """Query id → text, in file order; only those wanted, where given.

    Raises:
        UserError: a query has no text, an id occurs twice, or either is neither string nor number.
    """
    chosen = None if wanted is None else set(wanted)
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in read_part(data, "queries"):
        query_id = read_id(where, row)
        if query_id in seen:
            raise UserError(f"{where}: duplicate _id {query_id!r}")
        seen.add(query_id)
        text = read_text(where, row, "text").strip()
        if not text:
            raise UserError(f"{where}: query {query_id!r} has no text; drop it or give it one")
        if chosen is None or query_id in chosen:
            texts[query_id] = text
    return texts
