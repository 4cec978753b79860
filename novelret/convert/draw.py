"""Seeded base, train and test splits of a stream of pairs, exact in size, without keeping the stream."""

from __future__ import annotations

import numpy as np

from novelret.convert.writer import hash64
from novelret.errors import UserError
from novelret.progress import Reporter

SPLITS = ("base", "train", "test")
_SPARE = 1_000_000


def check_sizes(train: int, test: int) -> None:
    """Refuse sizes that no split can have, before the source is read.

    Raises:
        UserError: one is below 0.
    """
    if train < 0 or test < 0:
        raise UserError(f"--train {train} --test {test}: must not be below 0")


class Draw:
    """Gives every pair a random key; those with the smallest keys are the test split, the next train.

    The keys are hashes of seed and pair, so two passes over the source agree, on any machine.
    """

    def __init__(self, train: int, test: int, seed: int) -> None:
        """Draw `train` and `test` pairs of those that will be offered."""
        self.train, self.test, self.seed = train, test, seed
        self.total = 0
        self._keys: list[int] = []
        self._limits = (0, 0)

    def offer(self, query: str, item: str) -> None:
        """First pass: a pair that takes part."""
        self.total += 1
        self._keys.append(self._key(query, item))
        if len(self._keys) > self.train + self.test + _SPARE:
            self._keys = self._smallest().tolist()

    def close(self, report: Reporter) -> None:
        """End of the first pass. Where fewer pairs came than are asked for, all splits shrink; says so."""
        if self.train + self.test > self.total:
            asked = f"--train {self.train:,} and --test {self.test:,}"
            self.test = min(self.test, max(1, self.total // 10))
            self.train = min(self.train, max(1, (self.total - self.test) // 2), self.total - self.test)
            report.warn(
                f"pairs found: {self.total:,}, fewer than {asked}; the splits are smaller: "
                f"base {self.total - self.train - self.test:,}, train {self.train:,}, test {self.test:,}"
            )
        keys = np.sort(self._smallest())
        ends = (self.test, self.test + self.train)
        self._limits = (int(keys[ends[0] - 1]) if ends[0] else -1, int(keys[ends[1] - 1]) if ends[1] else -1)
        self._keys = []

    def split_of(self, query: str, item: str) -> str:
        """Second pass: "base", "train" or "test"."""
        key = self._key(query, item)
        if key <= self._limits[0]:
            return "test"
        return "train" if key <= self._limits[1] else "base"

    def _key(self, query: str, item: str) -> int:
        return hash64(f"{self.seed}\t{query}\t{item}")

    def _smallest(self) -> np.ndarray:
        keys = np.array(self._keys, dtype=np.uint64)
        wanted = self.train + self.test
        return keys if wanted >= len(keys) else np.partition(keys, wanted)[:wanted]
