"""Catalog rows that each query has any number of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RowLists:
    """Lists of catalog rows, one a query, in memory that grows with the rows and not with the longest list.

    Attributes:
        starts: (Q + 1,) int64; the rows of query q are those from starts[q] to starts[q + 1].
        rows: (n,) int64.
    """

    starts: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> np.ndarray:
        """(Q,) int64 lengths of the lists."""
        return np.diff(self.starts)

    @property
    def longest(self) -> int:
        """The length of the longest list."""
        return int(self.counts.max(initial=0))

    def padded(self, queries: np.ndarray) -> np.ndarray:
        """The lists of some queries: (b, w) int64, w the length of the longest of them, −1 padded."""
        counts = self.starts[1:][queries] - self.starts[:-1][queries]
        width = int(counts.max(initial=0))
        inside = np.arange(width) < counts[:, None]
        found = np.full(inside.shape, -1, dtype=np.int64)
        places = self.starts[:-1][queries][:, None] + np.arange(width)
        found[inside] = self.rows[places[inside]]
        return found

    def tensor(self, queries: np.ndarray, device: torch.device) -> torch.Tensor:
        """The same on a device."""
        return torch.from_numpy(self.padded(queries)).to(device)

    def take(self, queries: np.ndarray) -> RowLists:
        """The lists of some queries alone, in their order."""
        counts = self.counts[queries]
        starts = np.concatenate([[0], np.cumsum(counts)])
        moved = np.repeat(self.starts[:-1][queries] - starts[:-1], counts)
        return RowLists(starts, self.rows[np.arange(starts[-1]) + moved])

    def followed_by(self, others: RowLists) -> RowLists:
        """These lists, and behind them those of other queries."""
        starts = np.concatenate([self.starts, self.starts[-1] + others.starts[1:]])
        return RowLists(starts, np.concatenate([self.rows, others.rows]))

    def pairs(self, catalog_size: int) -> np.ndarray:
        """The (query, item) pairs: (n,) int64, query × catalog size + catalog row."""
        return np.repeat(np.arange(len(self)), self.counts) * np.int64(catalog_size) + self.rows


def row_lists(queries: np.ndarray, rows: np.ndarray, count: int) -> RowLists:
    """Lists of `count` queries, of (n,) pairs of query and catalog row; in a list they keep their order."""
    order = np.argsort(queries, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(queries, minlength=count))])
    return RowLists(starts.astype(np.int64), np.asarray(rows, dtype=np.int64)[order])
