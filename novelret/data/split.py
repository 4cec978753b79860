"""A split: its queries, and the feedback of those that have any as rows of the catalog."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from novelret.artifacts import fingerprint_array, fingerprint_of, fingerprint_strings
from novelret.data.catalog import Catalog, read_id
from novelret.data.source import qrels_name, read_excluded, read_part, read_qrels, read_unclicked
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
            or no pair with a positive score is left.
    """
    named = _read_pairs(data, split, ignore_identical_ids=ignore_identical_ids)
    if not named.queries:
        other = " and another item than the query itself" if ignore_identical_ids else ""
        raise UserError(
            f"{qrels_name(data, split)}: split {split!r} has no pairs; these need a score above 0{other}"
        )
    unclicked = {query_id: where for where, query_id in read_unclicked(data, split)}
    texts = load_queries(data, named.queries | unclicked)
    row_of = {query_id: row for row, query_id in enumerate(texts)}
    where_named = unclicked | dict(zip(named.queries, named.query_at, strict=True))
    for query_id, where in where_named.items():
        if query_id not in row_of:
            raise UserError(f"{where}: query id {query_id!r} is not in the queries file")
    item_ids = list(named.items)
    item_rows = catalog.rows_of(item_ids)
    missing = np.flatnonzero(item_rows < 0)
    if len(missing):
        first = int(missing[0])
        lines = int(np.isin(named.item_numbers, missing).sum())
        raise UserError(
            f"{named.item_at[first]}: item id {item_ids[first]!r} is not in the catalog "
            f"({lines} such line{'s' if lines > 1 else ''}); leave them out, or index the item"
        )
    query_rows = np.array([row_of[query_id] for query_id in named.queries], dtype=np.int64)
    queries, items = query_rows[np.asarray(named.query_numbers)], item_rows[np.asarray(named.item_numbers)]
    ids = list(texts)
    excluded = _excluded(data, split, row_of, catalog, ignore_identical_ids=ignore_identical_ids)
    kept = ~np.isin(queries * len(catalog) + items, excluded.pairs(len(catalog)))
    if not kept.any():
        raise UserError(f"{qrels_name(data, split)}: excluded/{split}.tsv leaves out all pairs of {split!r}")
    return make_split(split, ids, list(texts.values()), queries[kept], items[kept], excluded)


@dataclass
class _Pairs:
    """Pairs of ids as numbers, in the order the ids first came: eight bytes each, however long the ids are.

    `query_at` and `item_at` say where each id was first named.
    """

    queries: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    query_at: list[str] = field(default_factory=list)
    item_at: list[str] = field(default_factory=list)
    query_numbers: array[int] = field(default_factory=lambda: array("q"))
    item_numbers: array[int] = field(default_factory=lambda: array("q"))


def _read_pairs(data: str, split: str, *, ignore_identical_ids: bool) -> _Pairs:
    pairs = _Pairs()
    for where, query_id, item_id, score in read_qrels(data, split):
        if score > 0 and not (ignore_identical_ids and query_id == item_id):
            query = pairs.queries.setdefault(query_id, len(pairs.queries))
            item = pairs.items.setdefault(item_id, len(pairs.items))
            pairs.query_numbers.append(query)
            pairs.item_numbers.append(item)
            if query == len(pairs.query_at):
                pairs.query_at.append(where)
            if item == len(pairs.item_at):
                pairs.item_at.append(where)
    return pairs


def _excluded(
    data: str, split: str, row_of: dict[str, int], catalog: Catalog, *, ignore_identical_ids: bool
) -> RowLists:
    """Each query's own item, if it may not be ranked, and what excluded/SPLIT.tsv leaves out."""
    numbers: dict[str, int] = {}
    queries, items = array("q"), array("q")
    for _, query_id, item_id, _ in read_excluded(data, split):
        if query_id in row_of:
            queries.append(row_of[query_id])
            items.append(numbers.setdefault(item_id, len(numbers)))
    own = catalog.rows_of(list(row_of)) if ignore_identical_ids else np.empty(0, dtype=np.int64)
    listed = catalog.rows_of(list(numbers))[np.asarray(items)]
    query = np.concatenate([np.arange(len(own)), np.asarray(queries)])
    rows = np.concatenate([own, listed])
    return row_lists(query[rows >= 0], rows[rows >= 0], len(row_of))


def plain_texts(texts: list[str]) -> list[str]:
    """Texts without what makes no other query of them: case and white space."""
    return [" ".join(text.split()).casefold() for text in texts]


def load_queries(data: str, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """Query id → text, in file order; only those wanted, where given.

    Raises:
        UserError: a query has no text or an id occurs twice.
    """
    chosen = None if wanted is None else set(wanted)
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in read_part(data, "queries"):
        query_id = read_id(where, row)
        if query_id in seen:
            raise UserError(f"{where}: duplicate _id {query_id!r}")
        seen.add(query_id)
        text = str(row.get("text") or "").strip()
        if not text:
            raise UserError(f"{where}: query {query_id!r} has no text; drop it or give it one")
        if chosen is None or query_id in chosen:
            texts[query_id] = text
    return texts
