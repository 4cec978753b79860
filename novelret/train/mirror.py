"""Items as further training queries, where relevance goes both ways.

Where items are recommended for items, a query is an item of the catalog as well, and often relevant to what
is relevant to it. Then a pair teaches two queries: (q, z) also says that q is relevant to z. There are more
items of which something is known than there are queries, and how many different queries an encoder has seen
limits what it learns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from novelret.data.catalog import Catalog
from novelret.data.split import Split, load_queries, make_split
from novelret.errors import UserError
from novelret.label.table import RELEVANT, UNKNOWN, LabelTable, empty_table, join_tables, sort_table
from novelret.membership import find_sorted
from novelret.progress import Reporter
from novelret.row_lists import row_lists
from novelret.train.config import TrainConfig
from novelret.train.states import Material, gather_material

_MOSTLY = 0.5
"""The share of relevant pairs that is relevant the other way, too, above which items serve as queries."""

_DRAW = 0x3127  # the same whatever the seed of a run: what is searched for them is kept


@dataclass(frozen=True)
class Mirror:
    """The items that serve as queries; which of their pairs are known depends on who trains.

    Attributes:
        split: M items as queries, without feedback.
        rows: (M,) int64 catalog rows of these items, ascending.
        own: (Q,) int64 catalog row of each of the split's own queries, −1 for those that are no item.
    """

    split: Split
    rows: np.ndarray
    own: np.ndarray

    @property
    def more(self) -> int:
        """How many of the items are no queries of the split."""
        return len(np.setdiff1d(self.rows, self.own))


def reverse_verdicts(split: Split, labels: LabelTable, own: np.ndarray) -> tuple[int, int]:
    """Of feedback between items that are both queries: how often the reverse is judged relevant, and judged.

    Args:
        split: Q queries with their feedback.
        labels: their labels.
        own: (Q,) int64 catalog row of each query, −1 for those that are no item.
    """
    ascending = np.argsort(own, kind="stable")
    found, place = find_sorted(own[ascending], split.feedback_items)
    back = own[split.feedback_queries]
    found &= (back >= 0) & (back != split.feedback_items)
    verdicts = labels.lookup(ascending[place[found]], back[found])
    return int((verdicts == RELEVANT).sum()), int((verdicts != UNKNOWN).sum())


def goes_both_ways(relevant: int, judged: int) -> bool:
    """Whether most of what is relevant is so the other way, too: by the lower end of a 95 % interval."""
    from scipy.stats import binomtest  # loads for over a second

    return judged > 0 and bool(binomtest(relevant, judged).proportion_ci(method="wilson").low > _MOSTLY)


def find_mirror(
    config: TrainConfig, catalog: Catalog, split: Split, labels: LabelTable, report: Reporter
) -> Mirror | None:
    """The items that serve as queries: those known to be relevant to a query that is an item itself.

    Of more than the steps can draw, so many at random.

    Args:
        config: says whether that is wanted.
        catalog: the items.
        split: Q queries with their feedback.
        labels: their labels.
        report: told how many there are, and why they serve.

    Raises:
        UserError: they are wanted always, and there are none.
    """
    is_supervised = config.objective == "supervised"  # which must not see judgements
    if config.mirror == "never" or (config.mirror == "auto" and is_supervised):
        return None
    own = catalog.rows_of(split.query_ids)
    because = "--mirror always"
    if config.mirror == "auto":
        relevant, judged = reverse_verdicts(split, labels, own)
        if not goes_both_ways(relevant, judged):
            return None
        because = f"of {judged:,} pairs of feedback whose reverse is judged, {relevant:,} go both ways"
    seen = empty_table(len(catalog)) if is_supervised else labels
    queries, items = seen.relevant_and(split.feedback_queries, split.feedback_items)
    rows = np.unique(items[own[queries] >= 0])
    most = max(1, config.steps * config.batch_size // 2)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(_DRAW).choice(rows, most, replace=False))
    ids, texts = catalog.ids_at(rows), catalog.texts_at(rows)
    written = load_queries(config.data, ids)  # where an item has a text as a query, that is the better one
    texts = [written.get(name, text) for name, text in zip(ids, texts, strict=True)]
    none = np.empty(0, dtype=np.int64)
    itself = rows if config.ignore_identical_ids else none
    excluded = row_lists(np.arange(len(itself)), itself, len(rows))
    mirror = Mirror(make_split(split.name, ids, texts, none, none, excluded), rows, own)
    if not mirror.more:
        if config.mirror == "auto":
            return None
        raise UserError(
            "--mirror always: no item that is no query itself is known to be relevant to a query that is an "
            "item, by its id; use --mirror never"
        )
    report.note(
        f"training on {mirror.more:,} items as queries, too: {because} (--mirror never: not on these)"
    )
    return mirror


def with_mirror(
    material: Material,
    mirror: Mirror,
    queries: np.ndarray,
    base_rows: np.ndarray,
    pool: np.ndarray,
) -> Material:
    """The material with items as queries behind its own, and what is known of these the other way round.

    A pair is believed as far as the one that it mirrors. Held-back queries may be among the items, as those
    to come will be, with no other pairs than the trained queries' own, turned round; trained ones are not.

    Args:
        material: of the queries that are trained on.
        mirror: the items.
        queries: (q,) int64, which rows of the whole split the material's queries are.
        base_rows: (M, depth) the items' own lists of the deployed model.
        pool: (M, W) their T_L.
    """
    split, size = material.split, material.labels.catalog_size
    own = mirror.own[queries]
    query, item = material.relevant.T
    found, place = find_sorted(mirror.rows, item)
    found &= (own[query] >= 0) & ~np.isin(item, own)
    query, item = query[found], item[found]
    keys = (place[found] + len(split)) * size + own[query]
    order = np.argsort(keys)
    query, item, keys = query[order], item[order], keys[order]
    place, reverse = np.divmod(keys, size)
    is_feedback = material.is_feedback(query, item)
    both = make_split(
        split.name,
        [*split.query_ids, *mirror.split.query_ids],
        [*split.query_texts, *mirror.split.query_texts],
        np.concatenate([split.feedback_queries, place[is_feedback]]),
        np.concatenate([split.feedback_items, reverse[is_feedback]]),
        split.excluded.followed_by(mirror.split.excluded),
    )
    grades = None if material.labels.grades is None else material.labels.lookup_grades(query, item)
    verdicts = np.full(len(keys), RELEVANT, dtype=np.int8)
    grown = gather_material(
        both,
        _one_over_the_other(material.base_rows, base_rows),
        material.base_depth,
        join_tables(material.labels, sort_table(keys, verdicts, size, grades=grades)),
        material.reward,
        _one_over_the_other(material.pool, pool),
    )
    theirs = grown.positives[len(material.positives) :]  # behind ours, as their queries are
    of_theirs = np.searchsorted(keys, theirs[:, 0] * size + theirs[:, 1])
    trust = np.concatenate([material.trust, material.trust_of(query, item)[of_theirs]])
    return replace(grown, real=len(split), trust=trust, floor=material.floor)


def _one_over_the_other(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """One array over the other, the narrower one padded with −1."""
    shape = len(ours) + len(theirs), max(ours.shape[1], theirs.shape[1])
    whole = np.full(shape, -1, dtype=ours.dtype)
    whole[: len(ours), : ours.shape[1]] = ours
    whole[len(ours) :, : theirs.shape[1]] = theirs
    return whole
