"""Which (query, item) states a step trains on: the α/β/γ mixture of PG-Ret, §4.3.

The batch of step t is a function of (seed, t) alone, so a run that was killed goes on exactly where it
was, and every process of a distributed run knows the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from novelret.data.split import Split
from novelret.errors import UserError
from novelret.label.table import IRRELEVANT, RELEVANT, LabelTable, join_tables
from novelret.membership import find_sorted
from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.rewards import RewardFunction

FEEDBACK, BASE, POLICY = 0, 1, 2
SOURCES = ("feedback", "base", "policy")
_MIRRORED = 3  # the stream of items as queries
_CHUNK = 1 << 16  # pairs at a time: their queries' lists are copied out, 400 bytes each at L = 50


@dataclass(frozen=True)
class Material:
    """What states are drawn from.

    Attributes:
        split: queries and feedback.
        base_rows: (Q, depth) int32 or int64, the lists of the deployed model that is finetuned against.
        base_depth: L.
        pool: (Q, W) int32 or int64, T_L: the top-L lists of all deployed models, −1 padded.
        labels: verdicts by (query row, catalog row).
        reward: the reward function.
        positives: (P, 2) int64 labelled states (query row, item row) with reward > 0, ascending.
        negatives: (P', 2) int64 labelled states with reward < 0, ascending.
        promising: (F,) int64 queries that have a positive state, ascending.
        trust: (P,) float32, P(truly relevant) of each positive state, 1 where nothing says otherwise.
        real: how many of the split's queries are its own, the first; the others are items (see `mirror`).
        floor: the judge's estimated share of wrong yeses among irrelevant items (see `trust`).
    """

    split: Split
    base_rows: np.ndarray
    base_depth: int
    pool: np.ndarray
    labels: LabelTable
    reward: RewardFunction
    positives: np.ndarray
    negatives: np.ndarray
    promising: np.ndarray
    trust: np.ndarray
    real: int
    floor: float = 0.0

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

    def trust_of(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """How far each pair's reward is to be believed, float32, one per pair; 1 but for positive states."""
        trust = np.ones(len(query_rows), dtype=np.float32)
        found, place = find_sorted(self._keys, query_rows * self.labels.catalog_size + item_rows)
        known = found & (item_rows >= 0)
        trust[known] = self.trust[place[known]]
        return trust

    @cached_property
    def _keys(self) -> np.ndarray:
        return self.positives[:, 0] * self.labels.catalog_size + self.positives[:, 1]

    def known_relevant(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Whether items are feedback of their query or judged relevant to it; bool, broadcast shape."""
        judged: np.ndarray = self.labels.lookup(query_rows, item_rows) == RELEVANT
        return judged | self.is_feedback(query_rows, item_rows)

    def is_feedback(self, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Whether items are feedback of their query; bool, broadcast shape."""
        wanted = np.asarray(query_rows) * self.labels.catalog_size + np.asarray(item_rows)
        return find_sorted(self._feedback_keys, wanted)[0]

    @cached_property
    def _feedback_keys(self) -> np.ndarray:
        """Ascending, as feedback is sorted by (query, item)."""
        return self.split.feedback_queries * self.labels.catalog_size + self.split.feedback_items

    def no_negatives(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which catalog rows are known to be relevant to queries, or left out of their lists; (b, n) bool.

        Args:
            queries: (b,) query rows.
            rows: (n,) ascending catalog rows, in which a query's few known items are searched.
        """
        listed = np.concatenate(
            [items_of(self.relevant, queries), self.split.excluded.padded(queries)], axis=1
        )
        place = np.minimum(np.searchsorted(rows, listed), len(rows) - 1)
        query, column = np.nonzero(rows[place] == listed)
        found = np.zeros((len(queries), len(rows)), dtype=bool)
        found[query, place[query, column]] = True
        return found

    @cached_property
    def relevant(self) -> np.ndarray:
        """(P, 2) int64 pairs that are feedback or judged relevant (query row, item row), ascending."""
        split = self.split
        return np.stack(self.labels.relevant_and(split.feedback_queries, split.feedback_items), axis=1)

    @cached_property
    def _noes(self) -> np.ndarray:
        """Keys of the pairs that labels call irrelevant and that are no feedback, ascending."""
        keys: np.ndarray = self.labels.keys[self.labels.verdicts == IRRELEVANT]
        return keys[~find_sorted(self._feedback_keys, keys)[0]]

    def noes_at(self, queries: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Items that labels call irrelevant: (b, n) catalog rows, −1 where a query has none.

        Args:
            queries: (b,) query rows.
            at: (b, n) from 0 to below 1, where in its query's list each is taken.
        """
        size = self.labels.catalog_size
        first, end = (np.searchsorted(self._noes, of * size) for of in (queries, queries + 1))
        count = end - first
        places = first[:, None] + (at * count[:, None]).astype(np.int64)
        found = np.full(at.shape, -1, dtype=np.int64)
        found[count > 0] = self._noes[places[count > 0]] % size
        return found

    def rewarded_of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labelled items of queries with a reward: (b, M) rows, −1 padded, and their rewards, 0 padded."""
        rows = np.concatenate([items_of(part, queries) for part in (self.positives, self.negatives)], axis=1)
        rewards = np.zeros(rows.shape, dtype=np.float32)
        query, column = np.nonzero(rows >= 0)
        pairs = queries[query], rows[query, column]
        rewards[query, column] = self.rewards(*pairs) * self.trust_of(*pairs)
        return rows, rewards


def items_of(states: np.ndarray, queries: np.ndarray, most: int | None = None) -> np.ndarray:
    """The items that ascending (query, item) states name for each query: (b, M) rows, −1 padded.

    Of a query with more than `most`, so many at even distances.
    """
    first, last = (np.searchsorted(states[:, 0], queries, side) for side in ("left", "right"))
    count = last - first
    width = int(count.max(initial=0)) if most is None else min(most, int(count.max(initial=0)))
    places = first[:, None] + np.arange(width)[None] * np.maximum(count, width)[:, None] // max(1, width)
    inside = places < last[:, None]
    rows = np.full(places.shape, -1, dtype=np.int64)
    rows[inside] = states[places[inside], 1]
    return rows


@dataclass(frozen=True)
class Batch:
    """States of one step: `batch_size` forward passes of the query encoder, each of which serves some.

    Attributes:
        queries: (S,) int64 query rows.
        items: (S,) int64 catalog rows; −1 for policy states until they are drawn.
        sources: (S,) int8, FEEDBACK, BASE or POLICY.
        rewards: (S,) float32; NaN where the label is unknown.
        passes: (S,) int64, the state's forward pass, ascending from 0 to batch_size − 1.
        trust: (S,) float32, how far the reward is to be believed: the state's weight in the loss.
        sampled: (n,) int64, ascending catalog rows that pairs are contrasted with; none for in-batch ones.
    """

    queries: np.ndarray
    items: np.ndarray
    sources: np.ndarray
    rewards: np.ndarray
    passes: np.ndarray
    trust: np.ndarray
    sampled: np.ndarray

    def queries_of(self, passes: np.ndarray) -> np.ndarray:
        """The query rows that forward passes are over."""
        found: np.ndarray = self.queries[np.searchsorted(self.passes, passes)]
        return found

    def states_of(self, passes: np.ndarray) -> np.ndarray:
        """Positions of the states that these ascending passes serve; int64, ascending."""
        return np.flatnonzero(np.isin(self.passes, passes))


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
    material = Material(
        split, base_rows, base_depth, pool, labels, reward, none, none, none[:, 0], np.ones(0), len(split)
    )
    positives, negatives = [none], [none]
    for start in range(0, len(labels), _CHUNK):
        states = np.stack(np.divmod(labels.keys[start : start + _CHUNK], labels.catalog_size), axis=1)
        rewards = material.rewards(states[:, 0], states[:, 1])
        positives.append(states[rewards > 0])
        negatives.append(states[rewards < 0])
    found = np.concatenate(positives)
    return replace(
        material,
        positives=found,
        negatives=np.concatenate(negatives),
        promising=np.unique(found[:, 0]),
        trust=np.ones(len(found), dtype=np.float32),
    )


def with_more_labels(material: Material, more: LabelTable) -> Material:
    """The same material with further labels, which count over older ones and are believed."""
    grown = gather_material(
        material.split,
        material.base_rows,
        material.base_depth,
        join_tables(material.labels, more),
        material.reward,
        material.pool,
    )
    trust = material.trust_of(*grown.positives.T)
    return replace(grown, trust=trust, floor=material.floor, real=material.real)


def draw_batch(material: Material, config: TrainConfig, step: int) -> Batch:
    """The states of step `step`, shares α/β/γ of the batch by source.

    Policy states come without an item: that needs the step's own embeddings (see `sampler`).

    Raises:
        UserError: base states are asked for and no labelled one has a reward.
    """
    n_feedback, n_base, n_policy = config.states_by_source
    parts = [_draw_feedback(material, config, step, n_feedback)]
    if n_base:
        parts += _draw_base(material, config, step, n_base)
    if n_policy:
        parts.append(_draw_policy(material, config, step, n_policy))
    queries, items, sources, starts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    rewards = np.full(len(queries), np.nan, dtype=np.float32)
    known = items >= 0
    rewards[known] = material.rewards(queries[known], items[known])
    trust, sampled = material.trust_of(queries, items), _draw_catalog(material, config, step)
    return Batch(queries, items, sources, rewards, np.cumsum(starts) - 1, trust, sampled)


def items_as_queries(material: Material, config: TrainConfig) -> np.ndarray:
    """Query rows of the items that batches draw as queries: those of which a drawn pair is known."""
    n_feedback, n_base, n_policy = config.states_by_source
    drawn = [material.split.feedback_queries] if n_feedback else []
    if config.draw != "plain" and (n_base or (n_policy and config.objective in LIST_OBJECTIVES)):
        drawn.append(material.promising)
        if config.negative_share > 0:
            drawn.append(material.negatives[:, 0])
    rows = np.unique(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)
    return rows[rows >= material.real]


_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _states(queries: np.ndarray, items: np.ndarray, source: int, starts: np.ndarray | None = None) -> _Part:
    """States of one source; `starts` says which begin a forward pass, by default all do."""
    sources = np.full(len(queries), source, dtype=np.int8)
    starts = np.ones(len(queries), dtype=np.int64) if starts is None else starts.astype(np.int64)
    return queries.astype(np.int64), items.astype(np.int64), sources, starts


def _draw_feedback(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    split = material.split
    chosen = _drawn(split.feedback_queries, material.real, count, step, (config.seed, FEEDBACK))
    return _states(split.feedback_queries[chosen], split.feedback_items[chosen], FEEDBACK)


def _draw_catalog(material: Material, config: TrainConfig, step: int) -> np.ndarray:
    """Catalog rows at random, ascending, the same for all pairs of a step."""
    size = material.labels.catalog_size
    generator = np.random.default_rng((config.seed, FEEDBACK, 1, step))
    return np.sort(generator.choice(size, min(config.catalog_negatives, size), replace=False))


def _draw_base(material: Material, config: TrainConfig, step: int, count: int) -> list[_Part]:
    """States among the deployed model's ranks beyond L, as `draw` says."""
    if config.draw == "plain":
        return [_draw_plain(material, config, step, count)]
    negatives = _draw_negatives(material, config, step, count)
    count -= sum(len(part[0]) for part in negatives)
    _check_positives(material)
    draw = _draw_queries if config.draw == "queries" else _draw_states
    return [draw(material, config, step, count), *negatives]


def _draw_queries(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    """Queries with a positive state, each with all of these states, or `per_query` of them at random.

    A forward pass of the query encoder is what a step costs, and it serves any number of items.
    """
    stream = (config.seed, BASE, 1)
    queries = material.promising[_drawn(material.promising, material.real, count, step, stream)]
    rows = items_of(material.positives, queries)
    generator = np.random.default_rng((config.seed, BASE, 2, step))
    order = np.where(rows >= 0, generator.random(rows.shape), 2.0).argsort(axis=1)[:, : config.per_query]
    rows = np.take_along_axis(rows, order, axis=1)
    place, column = np.nonzero(rows >= 0)
    return _states(queries[place], rows[place, column], BASE, column == 0)


def _draw_states(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    """One labelled state for each forward pass."""
    positives = material.positives
    chosen = positives[_drawn(positives[:, 0], material.real, count, step, (config.seed, BASE, 1))]
    return _states(chosen[:, 0], chosen[:, 1], BASE)


def _draw_negatives(material: Material, config: TrainConfig, step: int, count: int) -> list[_Part]:
    count = round(config.negative_share * count)
    if not count or not len(material.negatives):
        return []
    less = material.negatives[shuffled(len(material.negatives), count, step, (config.seed, BASE, -1))]
    return [_states(less[:, 0], less[:, 1], BASE)]


def _check_positives(material: Material) -> None:
    if len(material.positives) == 0:
        raise UserError(
            "no labelled state has a positive reward: no relevant item beyond rank "
            f"{material.base_depth} is known; label deeper base ranks (`label --depth`) or more queries"
        )


def _draw_plain(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    """Any query and any rank beyond L, as published."""
    generator = np.random.default_rng((config.seed, BASE, step))
    queries = generator.integers(material.real, size=count)
    ranks = generator.integers(material.base_depth, material.base_rows.shape[1], size=count)
    return _states(queries, material.base_rows[queries, ranks], BASE)


def _draw_policy(material: Material, config: TrainConfig, step: int, count: int) -> _Part:
    """Queries for policy draws; list objectives spend theirs on queries that have something to find."""
    generator = np.random.default_rng((config.seed, POLICY, step))
    pool = np.arange(material.real)
    if config.objective in LIST_OBJECTIVES and config.draw != "plain" and len(material.promising):
        pool = material.promising
    own, mirrored = _mirrored(pool, material.real, count)
    mine, theirs = generator.choice(pool[:own], count - mirrored), generator.choice(pool[own:], mirrored)
    return _states(np.concatenate([mine, theirs]), np.full(count, -1), POLICY)


def _drawn(queries: np.ndarray, real: int, count: int, step: int, stream: tuple[int, ...]) -> np.ndarray:
    """Positions among examples of ascending queries, shuffled; half of items as queries, if there are any.

    Of so many more of them a draw without regard to kind would leave the queries themselves too few.
    """
    own, mirrored = _mirrored(queries, real, count)
    mine = shuffled(own, count - mirrored, step, stream)
    return np.concatenate([mine, own + shuffled(len(queries) - own, mirrored, step, (*stream, _MIRRORED))])


def _mirrored(queries: np.ndarray, real: int, count: int) -> tuple[int, int]:
    """Where items as queries begin among ascending queries, and how many of so many draws are of them."""
    own = int(np.searchsorted(queries, real))
    if own == len(queries):
        return own, 0
    return own, count // 2 if own else count


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


@lru_cache(maxsize=8)  # 8 bytes a pair each: the streams of a step, some of them between two epochs
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
