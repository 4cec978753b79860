"""Which (query, item) states a step trains on: the α/β/γ mixture of PG-Ret, §4.3.

The batch of step t is a function of (seed, t) alone, so a run that was killed goes on exactly where it
was, and every process of a distributed run knows the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from novelret.data.split import Split
from novelret.errors import UserError
from novelret.label.table import LabelTable, join_tables
from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.rewards import RewardFunction

FEEDBACK, BASE, POLICY = 0, 1, 2
SOURCES = ("feedback", "base", "policy")
_CHUNK = 1 << 16  # pairs at a time: their queries' lists are copied out, 400 bytes each at L = 50


@dataclass(frozen=True)
class Material:
    """What states are drawn from.

    Attributes:
        split: queries and feedback.
        base_rows: (Q, depth) int64, the lists of the deployed model that is finetuned against.
        base_depth: L.
        pool: (Q, W) int64, T_L: the top-L lists of all deployed models, −1 padded.
        labels: verdicts by (query row, catalog row).
        reward: the reward function.
        positives: (P, 2) int64 labelled states (query row, item row) with reward > 0.
        negatives: (P', 2) int64 labelled states with reward < 0.
    """

    split: Split
    base_rows: np.ndarray
    base_depth: int
    pool: np.ndarray
    labels: LabelTable
    reward: RewardFunction
    positives: np.ndarray
    negatives: np.ndarray

    def in_base(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Whether each item is in its query's T_L; bool, one per pair."""
        parts = [
            (self.pool[query_rows[s : s + _CHUNK]] == item_rows[s : s + _CHUNK, None]).any(axis=1)
            for s in range(0, len(query_rows), _CHUNK)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def rewards(
        self, query_rows: np.ndarray, item_rows: np.ndarray, labels: LabelTable | None = None
    ) -> np.ndarray:
        """Rewards of pairs, float32, NaN where the label is unknown; by other labels where given."""
        table = self.labels if labels is None else labels
        return _rewards(table, self.reward, query_rows, item_rows, self.in_base(query_rows, item_rows))

    def known_relevant(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Whether items are feedback of their query or judged relevant to it; bool, broadcast shape."""
        judged = self.labels.lookup(query_rows, item_rows) == 1
        return judged | _is_feedback(self.split, self.labels.catalog_size, query_rows, item_rows)

    def rewarded_of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labelled items of queries with a reward: (b, M) rows, −1 padded, and their rewards, 0 padded."""
        found = []
        for states in (self.positives, self.negatives):
            first, last = (np.searchsorted(states[:, 0], queries, side) for side in ("left", "right"))
            places = first[:, None] + np.arange(max(0, int((last - first).max(initial=0))))[None]
            inside = places < last[:, None]
            rows = np.full(places.shape, -1, dtype=np.int64)
            rows[inside] = states[places[inside], 1]
            found.append(rows)
        rows = np.concatenate(found, axis=1)
        rewards = np.zeros(rows.shape, dtype=np.float32)
        query, column = np.nonzero(rows >= 0)
        rewards[query, column] = self.rewards(queries[query], rows[query, column])
        return rows, rewards


@dataclass(frozen=True)
class Batch:
    """States of one step.

    Attributes:
        queries: (B,) int64 query rows.
        items: (B,) int64 catalog rows; −1 for policy states until they are drawn.
        sources: (B,) int8, FEEDBACK, BASE or POLICY.
        rewards: (B,) float32; NaN where the label is unknown.
    """

    queries: np.ndarray
    items: np.ndarray
    sources: np.ndarray
    rewards: np.ndarray


def gather_material(
    split: Split,
    base_rows: np.ndarray,
    base_depth: int,
    labels: LabelTable,
    reward: RewardFunction,
    pool: np.ndarray | None = None,
) -> Material:
    """Put together what states are drawn from; rewards of all labelled states are computed once.

    T_L is the deployed model's own top L where no `pool` of several is given.
    """
    none = np.empty((0, 2), dtype=np.int64)
    pool = base_rows[:, :base_depth] if pool is None else pool
    material = Material(split, base_rows, base_depth, pool, labels, reward, none, none)
    positives, negatives = [none], [none]
    for start in range(0, len(labels), _CHUNK):
        states = np.stack(np.divmod(labels.keys[start : start + _CHUNK], labels.catalog_size), axis=1)
        rewards = material.rewards(states[:, 0], states[:, 1])
        positives.append(states[rewards > 0])
        negatives.append(states[rewards < 0])
    return replace(material, positives=np.concatenate(positives), negatives=np.concatenate(negatives))


def with_more_labels(material: Material, more: LabelTable) -> Material:
    """The same material with further labels, which count over older ones."""
    return gather_material(
        material.split,
        material.base_rows,
        material.base_depth,
        join_tables(material.labels, more),
        material.reward,
        material.pool,
    )


def draw_batch(material: Material, config: TrainConfig, step: int) -> Batch:
    """The states of step `step`, shares α/β/γ of the batch by source.

    Policy states come without an item: that needs the step's own embeddings (see `sampler`).

    Raises:
        UserError: base states are asked for and no labelled one has a reward.
    """
    alpha, beta = (0.0, 0.0) if config.objective == "supervised" else (config.alpha, config.beta)
    if config.objective in LIST_OBJECTIVES:
        # Every draw of a list objective comes from the policy itself.
        alpha, beta = alpha + beta, 0.0
    n_policy, n_base = round(alpha * config.batch_size), round(beta * config.batch_size)
    parts = [_draw_feedback(material, config, step, config.batch_size - n_policy - n_base)]
    if n_base:
        draw = _draw_labelled if config.draw == "labelled" else _draw_plain
        parts.append(draw(material, config, step, n_base))
    if n_policy:
        parts.append(_draw_queries(material, config, step, n_policy))
    queries, items, sources = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    rewards = np.full(len(queries), np.nan, dtype=np.float32)
    known = items >= 0
    rewards[known] = material.rewards(queries[known], items[known])
    return Batch(queries, items, sources, rewards)


_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def _states(queries: np.ndarray, items: np.ndarray, source: int) -> _Part:
    return queries.astype(np.int64), items.astype(np.int64), np.full(len(queries), source, dtype=np.int8)


def _draw_feedback(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    split = material.split
    chosen = shuffled(len(split.feedback_queries), count, step, (config.seed, FEEDBACK))
    return _states(split.feedback_queries[chosen], split.feedback_items[chosen], FEEDBACK)


def _draw_labelled(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    positives, negatives = material.positives, material.negatives
    if len(positives) == 0:
        raise UserError(
            "no labelled state has a positive reward: no relevant item beyond rank "
            f"{material.base_depth} is known; label deeper base ranks (`label --depth`) or more queries"
        )
    n_negative = round(config.negative_share * count) if len(negatives) else 0
    chosen = positives[shuffled(len(positives), count - n_negative, step, (config.seed, BASE, 1))]
    if n_negative:
        less = negatives[shuffled(len(negatives), n_negative, step, (config.seed, BASE, -1))]
        chosen = np.concatenate([chosen, less])
    return _states(chosen[:, 0], chosen[:, 1], BASE)


def _draw_queries(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    """Queries for policy draws; list objectives spend theirs on queries that have something to find."""
    generator = np.random.default_rng((config.seed, POLICY, step))
    pool = np.arange(len(material.split))
    if config.objective in LIST_OBJECTIVES and config.draw == "labelled" and len(material.positives):
        pool = np.unique(material.positives[:, 0])
    return _states(generator.choice(pool, size=count), np.full(count, -1), POLICY)


def _draw_plain(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    generator = np.random.default_rng((config.seed, BASE, step))
    queries = generator.integers(len(material.split), size=count)
    ranks = generator.integers(material.base_depth, material.base_rows.shape[1], size=count)
    return _states(queries, material.base_rows[queries, ranks], BASE)


def shuffled(total: int, count: int, step: int, stream: tuple[int, ...]) -> np.ndarray:
    """Positions of step `step` in an endless run of shuffled epochs over range(total); int64, (count,)."""
    first = step * count
    positions = np.arange(first, first + count)
    epochs = positions // total
    chosen = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        chosen[inside] = _permutation(total, (*(part % (1 << 32) for part in stream), int(epoch)))[
            positions[inside] % total
        ]
    return chosen


@lru_cache(maxsize=8)
def _permutation(total: int, stream: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(stream).permutation(total)


def _rewards(
    labels: LabelTable,
    reward: RewardFunction,
    query_rows: np.ndarray,
    item_rows: np.ndarray,
    in_base: np.ndarray,
) -> np.ndarray:
    verdicts = torch.from_numpy(labels.lookup(query_rows, item_rows))
    grades = torch.from_numpy(labels.lookup_grades(query_rows, item_rows))
    values: np.ndarray = reward(verdicts, grades, torch.from_numpy(in_base)).numpy()
    return values


def _is_feedback(
    split: Split, catalog_size: int, query_rows: np.ndarray, item_rows: np.ndarray
) -> np.ndarray:
    # Feedback is sorted by (query, item), so its keys are ascending.
    keys = split.feedback_queries * catalog_size + split.feedback_items
    wanted = np.asarray(query_rows) * catalog_size + np.asarray(item_rows)
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: np.ndarray = keys[position] == wanted
    return found
