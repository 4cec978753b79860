"""A split: the queries that have feedback, and that feedback as rows of the catalog."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from novelret.artifacts import fingerprint_of, fingerprint_strings
from novelret.data.catalog import Catalog, read_id
from novelret.data.source import read_excluded, read_part, read_qrels
from novelret.errors import UserError


@dataclass(frozen=True)
class Split:
    """Queries with their positive feedback.

    Attributes:
        name: the split's name ("train", "test", …).
        query_ids: Q ids, in the order of the queries file.
        query_texts: Q texts.
        feedback_queries: (P,) int64, row of each pair's query; ascending.
        feedback_items: (P,) int64, catalog row of each pair's item; ascending within a query.
        excluded: (Q, E) int64 catalog rows that are left out of each query's rankings, −1 padded.
        fingerprint: identity of all of this.
    """

    name: str
    query_ids: list[str]
    query_texts: list[str]
    feedback_queries: np.ndarray
    feedback_items: np.ndarray
    excluded: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.query_ids)

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
            self.excluded[rows],
        )


def make_split(
    name: str,
    query_ids: list[str],
    query_texts: list[str],
    feedback_queries: np.ndarray,
    feedback_items: np.ndarray,
    excluded: np.ndarray,
) -> Split:
    """Put a split together: sort its feedback, drop repeated pairs, fingerprint it."""
    pairs = np.unique(np.stack([feedback_queries, feedback_items], axis=1), axis=0)
    fingerprint = fingerprint_of(
        name,
        fingerprint_strings(query_ids),
        fingerprint_strings(query_texts),
        pairs.tolist(),
        excluded.tolist(),
    )
    return Split(name, query_ids, query_texts, pairs[:, 0].copy(), pairs[:, 1].copy(), excluded, fingerprint)


def load_split(data: str, split: str, catalog: Catalog, *, ignore_identical_ids: bool = True) -> Split:
    """Read a split's qrels and the queries they name.

    Args:
        data: a BEIR folder or a Hugging Face data set.
        split: name of the qrels file or of the data set's split.
        catalog: the indexed items.
        ignore_identical_ids: leave the item whose id is the query's own out of its rankings and of its
            feedback, as BEIR does.

    Raises:
        UserError: a qrels line names an unknown query or item, a query has no text, an id occurs
            twice, or no pair with a positive score is left.
    """
    wheres: list[str] = []
    queries: list[str] = []
    items: list[str] = []
    for where, query_id, item_id, score in read_qrels(data, split):
        if score > 0 and not (ignore_identical_ids and query_id == item_id):
            wheres.append(where)
            queries.append(query_id)
            items.append(item_id)
    if not queries:
        raise UserError(f"{data}: no {split} pairs left; qrels/{split} holds no line with a score above 0")
    texts = load_queries(data, set(queries))
    row_of = {query_id: row for row, query_id in enumerate(texts)}
    for where, query_id in zip(wheres, queries, strict=True):
        if query_id not in row_of:
            raise UserError(f"{where}: query id {query_id!r} is not in the queries file")
    item_rows = catalog.rows_of(items)
    missing = np.flatnonzero(item_rows < 0)
    if len(missing):
        first = int(missing[0])
        raise UserError(
            f"{wheres[first]}: item id {items[first]!r} is not in the catalog ({len(missing)} such lines)"
        )
    ids = list(texts)
    return make_split(
        split,
        ids,
        list(texts.values()),
        np.array([row_of[q] for q in queries], dtype=np.int64),
        item_rows,
        np.concatenate(
            [
                own_rows(ids, catalog, ignore_identical_ids=ignore_identical_ids),
                _excluded_rows(data, split, row_of, catalog),
            ],
            axis=1,
        ),
    )


def _excluded_rows(data: str, split: str, row_of: dict[str, int], catalog: Catalog) -> np.ndarray:
    """(Q, E) catalog rows that excluded/SPLIT.tsv leaves out of each query's rankings, −1 padded."""
    found = [(row_of[query], item) for _, query, item, _ in read_excluded(data, split) if query in row_of]
    queries = np.array([query for query, _ in found], dtype=np.int64)
    rows = catalog.rows_of([item for _, item in found]) if found else queries
    queries, rows = queries[rows >= 0], rows[rows >= 0]
    order = np.argsort(queries, kind="stable")
    counts = np.bincount(queries, minlength=len(row_of))
    column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    excluded = np.full((len(row_of), counts.max(initial=0)), -1, dtype=np.int64)
    excluded[queries[order], column] = rows[order]
    return excluded


def own_rows(query_ids: list[str], catalog: Catalog, *, ignore_identical_ids: bool) -> np.ndarray:
    """(Q, 1) catalog row of the item with the query's own id, −1 where there is none or it may be ranked."""
    if not ignore_identical_ids:
        return np.full((len(query_ids), 1), -1, dtype=np.int64)
    return catalog.rows_of(query_ids)[:, None]


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
