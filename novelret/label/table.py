"""Judgements as a sorted table that whole arrays of (query, item) pairs are looked up in at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from novelret.membership import find_sorted, sorted_union
from novelret.row_lists import RowLists

RELEVANT, IRRELEVANT, UNKNOWN = 1, 0, -1
"""Verdicts, int8. Unknown is a state of its own (never asked, or no usable answer) and never a 0."""


@dataclass(frozen=True)
class LabelTable:
    """Verdicts by (query row, catalog row); 9 bytes per judgement, 13 with grades.

    Attributes:
        keys: (J,) int64, query row × catalog size + catalog row; ascending, unique.
        verdicts: (J,) int8, RELEVANT or IRRELEVANT.
        catalog_size: number of items N.
        missing: what an absent pair means: UNKNOWN, or IRRELEVANT for complete judgements.
        grades: (J,) float32 graded relevance, NaN where a judge gave none; None where none ever did.
    """

    keys: np.ndarray
    verdicts: np.ndarray
    catalog_size: int
    missing: int = UNKNOWN
    grades: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def query_rows(self) -> np.ndarray:
        """(J,) int64 query row of each judgement."""
        return self.keys // self.catalog_size

    @property
    def item_rows(self) -> np.ndarray:
        """(J,) int64 catalog row of each judgement."""
        return self.keys % self.catalog_size

    def lookup(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Verdicts of pairs, int8, in the broadcast shape of the two; UNKNOWN for item rows of −1."""
        found, position = self._find(query_rows, item_rows)
        verdicts = np.full(found.shape, self.missing, dtype=np.int8)
        verdicts[found] = self.verdicts[position[found]]
        verdicts[np.broadcast_to(np.asarray(item_rows) < 0, found.shape)] = UNKNOWN
        return verdicts

    def lookup_grades(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Grades of pairs, float32: a judge's grade, else 1 or 0 by its verdict; NaN where unknown."""
        verdicts = self.lookup(query_rows, item_rows)
        grades = np.where(verdicts == UNKNOWN, np.nan, verdicts).astype(np.float32)
        if self.grades is not None:
            found, position = self._find(query_rows, item_rows)
            given = self.grades[position[found]]
            grades[found] = np.where(np.isnan(given), grades[found], given)
        return grades

    def relevant_and(self, query_rows: np.ndarray, item_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The given pairs and those called relevant: (P,) query rows, ascending, and (P,) catalog rows."""
        given = np.asarray(query_rows, dtype=np.int64) * self.catalog_size + item_rows
        keys = sorted_union(given, self.keys[self.verdicts == RELEVANT])
        return keys // self.catalog_size, keys % self.catalog_size

    def without(self, excluded: RowLists) -> LabelTable:
        """The judgements but those of items that queries leave out of their lists."""
        kept = ~np.isin(self.keys, excluded.pairs(self.catalog_size))
        grades = None if self.grades is None else self.grades[kept]
        return replace(self, keys=self.keys[kept], verdicts=self.verdicts[kept], grades=grades)

    def _find(self, query_rows: np.ndarray, item_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs are in the table, and where."""
        rows = np.asarray(item_rows, dtype=np.int64)
        wanted = np.asarray(query_rows, dtype=np.int64) * self.catalog_size + rows
        found, position = find_sorted(self.keys, wanted)
        return found & (rows >= 0), position


def make_table(
    query_rows: np.ndarray,
    item_rows: np.ndarray,
    verdicts: np.ndarray,
    catalog_size: int,
    missing: int = UNKNOWN,
    grades: np.ndarray | None = None,
) -> LabelTable:
    """Sort judgements into a table; the last one for a pair counts, unusable ones are dropped."""
    keys = query_rows.astype(np.int64) * catalog_size + item_rows
    return sort_table(keys, verdicts, catalog_size, missing, grades)


def empty_table(catalog_size: int) -> LabelTable:
    """A table of nothing: every pair is unknown."""
    none = np.empty(0, dtype=np.int64)
    return make_table(none, none, none.astype(np.int8), catalog_size)


def sort_table(
    keys: np.ndarray,
    verdicts: np.ndarray,
    catalog_size: int,
    missing: int = UNKNOWN,
    grades: np.ndarray | None = None,
) -> LabelTable:
    """Sort judgements, given by query row × catalog size + catalog row, into a table as `make_table` does."""
    # A step at a time: of 10 million judgements every array that is held for longer than needed takes 80 MB.
    if grades is not None and np.isnan(grades).all():
        grades = None
    usable = verdicts != UNKNOWN
    if not usable.all():
        keys, verdicts = keys[usable], verdicts[usable]
        grades = None if grades is None else grades[usable]
    if not (keys[1:] > keys[:-1]).all():
        order = np.argsort(keys, kind="stable")
        keys, verdicts = keys[order], verdicts[order]
        grades = None if grades is None else grades[order]
        del order
        last = np.ones(len(keys), dtype=bool)
        last[:-1] = keys[1:] != keys[:-1]
        keys, verdicts = keys[last], verdicts[last]
        grades = None if grades is None else grades[last]
    if grades is not None:
        grades = None if np.isnan(grades).all() else grades.astype(np.float32, copy=False)
    return LabelTable(keys, verdicts.astype(np.int8, copy=False), catalog_size, missing, grades)


def join_tables(older: LabelTable, newer: LabelTable) -> LabelTable:
    """Both tables' judgements, over the same rows; the newer one's count where both hold a pair."""
    grades = None
    if older.grades is not None or newer.grades is not None:
        grades = np.concatenate(
            [
                np.full(len(table), np.nan, dtype=np.float32) if table.grades is None else table.grades
                for table in (older, newer)
            ]
        )
    return sort_table(
        np.concatenate([older.keys, newer.keys]),
        np.concatenate([older.verdicts, newer.verdicts]),
        older.catalog_size,
        older.missing,
        grades,
    )
