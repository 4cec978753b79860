"""What of a labelled pair suggests that the judge's yes is right: see `trust`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from novelret.blocks import read_rows
from novelret.label.table import IRRELEVANT, RELEVANT
from novelret.train.states import Material, items_of

_REFERENCES = 256
"""Of a query's yeses or feedback, how many a pair is compared with."""

_GROUP = 256  # pairs of one query that are compared at once
_CHUNK = 1 << 16  # labels at a time
_NUMBERS = 1 << 24  # of embeddings held at a time, 64 MB
_FEATURES = 7
RATE, SIMILAR = 4, 5  # two of them


@dataclass(frozen=True)
class Labelled:
    """Labelled pairs beyond T_L.

    Attributes:
        yeses: (Y, 2) int64 (query row, item row), ascending.
        noes: (n, 2) int64, a sample, ascending.
        no_weight: how many pairs each of `noes` stands for.
        yes_count: (Q,) yeses of each query.
        count: (Q,) labelled pairs of each query.
    """

    yeses: np.ndarray
    noes: np.ndarray
    no_weight: float
    yes_count: np.ndarray
    count: np.ndarray


def gather_labelled(material: Material, most: int, seed: int) -> Labelled:
    """The labelled pairs beyond T_L: all yeses, and about `most` noes."""
    labels, n_queries = material.labels, len(material.split)
    share = min(1.0, most / max(1, int((labels.verdicts == IRRELEVANT).sum())))
    rng = np.random.default_rng((seed % (1 << 32), 1))
    yeses, noes = [], []
    counts = np.zeros((2, n_queries), dtype=np.int64)
    for start in range(0, len(labels), _CHUNK):
        verdicts = labels.verdicts[start : start + _CHUNK]
        pairs = np.stack(np.divmod(labels.keys[start : start + _CHUNK], labels.catalog_size), axis=1)
        novel = ~material.in_base(pairs[:, 0], pairs[:, 1])
        yeses.append(pairs[novel & (verdicts == RELEVANT)])
        sampled = rng.random(len(pairs)) < share
        noes.append(pairs[novel & (verdicts == IRRELEVANT) & sampled])
        for verdict in (IRRELEVANT, RELEVANT):
            counts[verdict] += np.bincount(pairs[novel & (verdicts == verdict), 0], minlength=n_queries)
    none = np.empty((0, 2), dtype=np.int64)
    total = counts.sum(axis=0)
    return Labelled(
        np.concatenate([none, *yeses]), np.concatenate([none, *noes]), 1 / share, counts[RELEVANT], total
    )


@dataclass(frozen=True)
class Pairs:
    """What features of a pair are computed from."""

    material: Material
    labelled: Labelled
    queries: np.ndarray
    items: np.ndarray

    def features(self, pairs: np.ndarray, is_yes: np.ndarray) -> np.ndarray:
        """Features of (query, item) pairs, grouped by query, (n, 7) float64; similarities may be NaN.

        Args:
            pairs: (n, 2) int64.
            is_yes: (n,) bool, the judge's verdicts, which no pair's own features may depend on.
        """
        found = np.empty((len(pairs), _FEATURES))
        queries, labelled = pairs[:, 0], self.labelled
        mean_rate = labelled.yes_count.sum() / labelled.count.sum()
        # Among the query's other labels; one more, as the average query's, stands in where there is none.
        rate = (labelled.yes_count[queries] - is_yes + mean_rate) / labelled.count[queries]
        found[:, 0] = self._scores(pairs)
        edge = self.material.base_rows[:, self.material.base_depth - 1]
        asked, place = np.unique(queries, return_inverse=True)
        found[:, 1] = found[:, 0] - self._scores(np.stack([asked, np.maximum(edge[asked], 0)], axis=1))[place]
        found[:, 2] = np.log(self._ranks(pairs))
        found[:, 3] = np.log(1e-3 + rate)
        found[:, RATE] = rate
        split = self.material.split
        feedback = np.stack([split.feedback_queries, split.feedback_items], axis=1)
        found[:, SIMILAR] = self._similarities(pairs, labelled.yeses, 3, others=True)
        found[:, 6] = self._similarities(pairs, feedback, 1, others=False)
        return found

    def _scores(self, pairs: np.ndarray) -> np.ndarray:
        """Deployed scores, (n,) float32."""
        size = max(1, _NUMBERS // (2 * self.items.shape[1]))
        parts = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(pairs), size):
            query, item = pairs[start : start + size].T
            parts.append(np.einsum("nd,nd->n", self.queries[query], read_rows(self.items, item)))
        return np.concatenate(parts)

    def _ranks(self, pairs: np.ndarray) -> np.ndarray:
        """Ranks in the base lists, from 1, (n,); one beyond the list's depth for what is not in it."""
        depth = self.material.base_rows.shape[1]
        size = max(1, _NUMBERS // (4 * depth))
        parts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(pairs), size):
            query, item = pairs[start : start + size].T
            same = self.material.base_rows[query] == item[:, None]
            parts.append(np.where(same.any(axis=1), same.argmax(axis=1), depth) + 1)
        return np.concatenate(parts)

    def _similarities(self, pairs: np.ndarray, of: np.ndarray, most: int, *, others: bool) -> np.ndarray:
        """Mean of the `most` largest similarities to a query's items `of`, (n,) float64, NaN without any.

        With `others`, an item is not compared with itself.
        """
        found = np.full(len(pairs), np.nan)
        for group in _groups(pairs[:, 0], self.items.shape[1]):
            queries, inside = pairs[group[:, 0], 0], group >= 0
            references = items_of(of, queries, _REFERENCES)
            if references.shape[1] == 0:
                continue
            rows = np.where(inside, pairs[group, 1], 0)
            items, vectors = (
                torch.from_numpy(read_rows(self.items, np.maximum(part, 0))) for part in (rows, references)
            )
            similar = torch.bmm(items, vectors.transpose(1, 2))
            absent = (references < 0)[:, None, :]
            if others:
                absent = absent | (references[:, None, :] == rows[:, :, None])
            similar = similar.masked_fill(torch.from_numpy(absent), -torch.inf)
            best = torch.topk(similar, min(most, similar.shape[2]), dim=2).values.double()
            there = torch.isfinite(best)
            mean = best.masked_fill(~there, 0.0).sum(dim=2) / there.sum(dim=2)
            found[group[inside]] = mean.numpy()[inside]
        return found


def _groups(queries: np.ndarray, dimension: int) -> Iterator[np.ndarray]:
    """Positions of pairs by query, in parts that fit in memory: (g, ≤ _GROUP) int64, −1 padded."""
    order = np.argsort(queries, kind="stable")
    ordered = queries[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    of_query = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    firsts = np.flatnonzero((np.arange(len(order)) - of_query) % _GROUP == 0)
    counts = np.diff(np.append(firsts, len(order)))
    size = max(1, _NUMBERS // ((_GROUP + _REFERENCES) * dimension))
    for start in range(0, len(firsts), size):
        first, count = firsts[start : start + size, None], counts[start : start + size, None]
        column = np.arange(int(count.max()))[None]
        inside = column < count
        yield np.where(inside, order[np.where(inside, first + column, 0)], -1)
