"""TREC run files, in and out, and qrels out (`read_qrels_file` reads them)."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from novelret.data.catalog import Catalog
from novelret.data.source import read_lines
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.search import DECIMALS

_LINES = 1 << 20  # whose ids are looked up at once, in a pass over the catalog's


def write_run(
    path: Path, rows: np.ndarray, scores: np.ndarray, query_ids: list[str], catalog: Catalog, name: str
) -> None:
    """Write lists as `query Q0 item rank score name`, scores with the six decimals that decide ties."""
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), 1024):
            chunk = rows[start : start + 1024]
            present = chunk >= 0
            ids = iter(catalog.ids_at(chunk[present]))
            for q in range(len(chunk)):
                query_id, count = query_ids[start + q], int(present[q].sum())
                file.writelines(
                    f"{query_id} Q0 {next(ids)} {rank} {score:.{DECIMALS}f} {name}\n"
                    for rank, score in enumerate(scores[start + q, :count].tolist(), 1)
                )


def write_qrels(
    path: Path,
    query_rows: np.ndarray,
    item_rows: np.ndarray,
    grades: np.ndarray,
    query_ids: list[str],
    catalog: Catalog,
) -> None:
    """Write judged pairs as `query 0 item grade`."""
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(query_rows), 65_536):
            rows = slice(start, start + 65_536)
            file.writelines(
                f"{query_ids[query]} 0 {item_id} {grade}\n"
                for query, item_id, grade in zip(
                    query_rows[rows].tolist(),
                    catalog.ids_at(item_rows[rows]),
                    grades[rows].tolist(),
                    strict=True,
                )
            )


def read_run(path: Path, split: Split, catalog: Catalog, k: int, id_rank: np.ndarray) -> np.ndarray:
    """Read a run as (Q, k) catalog rows, −1 padded, ordered by score, then by item id, descending.

    Scores are compared as they stand: another retriever's may differ by less than ours are rounded to. Ranks
    are ignored. Items that the split leaves out of a query's rankings are left out here too.

    Raises:
        UserError: a malformed line, an unknown item, a repeated item, a score that is no number, or no
            query in common.
    """
    query_ids = split.query_ids
    row_of = {query_id: row for row, query_id in enumerate(query_ids)}
    # A run may have many million lines: of each only four numbers are held.
    numbers, queries, rows, scores = array("q"), array("q"), array("q"), array("d")
    items: list[str] = []

    def look_up() -> None:
        found = catalog.rows_of(items)
        if (found < 0).any():
            first = int(np.flatnonzero(found < 0)[0])
            where = f"{path}:{numbers[len(rows) + first]}"
            raise UserError(f"{where}: item id {items[first]!r} is not in the catalog")
        rows.frombytes(found.astype(np.int64).tobytes())
        items.clear()

    for number, line in read_lines(path):
        where = f"{path}:{number}"
        columns = line.split()
        if len(columns) != 6:
            raise UserError(f"{where}: {len(columns)} columns, expected query Q0 item rank score name")
        try:
            score = float(columns[4])
        except ValueError:
            score = float("nan")
        if not np.isfinite(score):
            raise UserError(f"{where}: the score {columns[4]!r} is not a finite number")
        if columns[0] in row_of:
            numbers.append(number)
            queries.append(row_of[columns[0]])
            scores.append(score)
            items.append(columns[2])
            if len(items) == _LINES:
                look_up()
    if not queries:
        raise UserError(f"{path}: no line is about the split's queries; is it the right run?")
    look_up()
    return _lists(
        path, split, catalog, k, id_rank, *(np.array(part) for part in (numbers, queries, rows, scores))
    )


def _lists(
    path: Path,
    split: Split,
    catalog: Catalog,
    k: int,
    id_rank: np.ndarray,
    numbers: np.ndarray,
    query_rows: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """Put lines together as (Q, k) lists; `numbers` say where in the file each stands."""
    pair = query_rows * len(catalog) + rows
    _, first_seen = np.unique(pair, return_index=True)
    if len(first_seen) != len(pair):
        again = int(np.setdiff1d(np.arange(len(pair)), first_seen)[0])
        item = catalog.ids_at(rows[again : again + 1])[0]
        raise UserError(f"{path}:{numbers[again]}: item {item!r} occurs twice for this query")
    allowed = np.flatnonzero(~np.isin(pair, split.excluded.pairs(len(catalog))))
    query_rows, rows, scores = query_rows[allowed], rows[allowed], scores[allowed]
    order = np.lexsort((-id_rank[rows].astype(np.int64), -scores, query_rows))
    ordered = query_rows[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    kept = place < k
    lists = np.full((len(split), k), -1, dtype=np.int64)
    lists[ordered[kept], place[kept]] = rows[order][kept]
    return lists
