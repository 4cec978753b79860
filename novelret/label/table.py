"""Judgements as a sorted table that whole arrays of (query, item) pairs are looked up in at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RELEVANT, IRRELEVANT, UNKNOWN = 1, 0, -1
"""Verdicts, int8. Unknown is a state of its own (never asked, or no usable answer) and never a 0."""


@dataclass(frozen=True)
class LabelTable:
    """Verdicts by (query row, catalog row); 9 bytes per judgement.

    Attributes:
        keys: (J,) int64, query row × catalog size + catalog row; ascending, unique.
        verdicts: (J,) int8, RELEVANT or IRRELEVANT.
        catalog_size: number of items N.
        missing: what an absent pair means: UNKNOWN, or IRRELEVANT for complete judgements.
    """

    keys: np.ndarray
    verdicts: np.ndarray
    catalog_size: int
    missing: int = UNKNOWN

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
        rows = np.asarray(item_rows, dtype=np.int64)
        wanted = np.asarray(query_rows, dtype=np.int64) * self.catalog_size + rows
        if len(self.keys) == 0:
            found = np.full(wanted.shape, self.missing, dtype=np.int8)
        else:
            position = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            found = np.where(self.keys[position] == wanted, self.verdicts[position], self.missing)
        return np.where(rows < 0, UNKNOWN, found).astype(np.int8)


def make_table(
    query_rows: np.ndarray,
    item_rows: np.ndarray,
    verdicts: np.ndarray,
    catalog_size: int,
    missing: int = UNKNOWN,
) -> LabelTable:
    """Sort judgements into a table; the last one for a pair counts, unusable ones are dropped."""
    usable = verdicts != UNKNOWN
    keys = query_rows[usable].astype(np.int64) * catalog_size + item_rows[usable]
    kept = verdicts[usable].astype(np.int8)
    order = np.argsort(keys, kind="stable")
    keys, kept = keys[order], kept[order]
    last = np.ones(len(keys), dtype=bool)
    last[:-1] = keys[1:] != keys[:-1]
    return LabelTable(keys[last], kept[last], catalog_size, missing)
