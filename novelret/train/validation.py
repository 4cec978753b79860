"""Validation during training, and which checkpoint it chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from novelret.data.split import Split, plain_texts
from novelret.errors import UserError
from novelret.evaluate.metrics import feedback_hits, novel, recall
from novelret.label.table import RELEVANT, UNKNOWN, LabelTable
from novelret.row_lists import RowLists
from novelret.tradeoff import keeps_recall, unbeaten
from novelret.trained import hash_queries

_NOT_SURE = 100  # judged novel items; few say little of those that are not judged

MOST_QUERIES = 2_000
"""A validation search costs one pass over the catalog; more queries than this do not sharpen it much."""


@dataclass(frozen=True)
class Validation:
    """Held-back queries and what is known of them; where several processes train, each holds a share.

    Attributes:
        split: the held-back queries with their feedback.
        known: (P,) query rows and (P,) catalog rows of the pairs whose recall is measured.
        base_rows: (V, L) int32 or int64, the lists of the deployed model that is finetuned against.
        pool: (V, W) int32 or int64, T_L: the top-L lists of all deployed models, −1 padded.
        labels: verdicts by (validation query row, catalog row).
    """

    split: Split
    known: tuple[np.ndarray, np.ndarray]
    base_rows: np.ndarray
    pool: np.ndarray
    labels: LabelTable


@dataclass(frozen=True)
class Point:
    """One checkpoint on the validation queries: a point of the novelty–recall frontier.

    Attributes:
        step: optimizer steps taken.
        novelty: mean number of items in the top L that the deployed top L does not hold (Definition 1).
        relevant_novel: mean number of those that are judged relevant.
        recall: mean per-query share of what is known to be relevant (`known_pairs`) in the top L, over the
            queries of which something is known.
        judged_novel: share of the novel items that are judged at all.
        likely: `relevant_novel`, and what those that are not judged would add at the rate of the others.
        base_recall: the deployed model's recall on the same queries.
        recall_error: standard error of the mean difference between the two recalls.
        share: weights lie at this share of the line from the start to those of the step; 1 for a checkpoint.
        memory: queries move by this share of what their memory adds; 1 for a checkpoint, or without one.
    """

    step: int
    novelty: float
    relevant_novel: float
    recall: float
    judged_novel: float
    likely: float
    base_recall: float
    recall_error: float
    share: float = 1.0
    memory: float = 1.0

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are just what training left after the step."""
        return self.share == self.memory == 1

    @property
    def name(self) -> str:
        """What it is called in tables, charts and folders."""
        blend = "" if self.share == 1 else f"-share-{self.share:g}"
        return f"step-{self.step}{blend}" + ("" if self.memory == 1 else f"-memory-{self.memory:g}")


def held_back_hashes(split: Split, fraction: float, seed: int) -> np.ndarray:
    """(n,) uint64 hashes of the queries that `hold_back` holds back (see `trained.hash_queries`)."""
    _, rows = hold_back(split, fraction, seed)
    return hash_queries([split.query_texts[row] for row in rows])


def hold_back(split: Split, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and validation queries, each ascending; queries of the same text stay together.

    Raises:
        UserError: one of the two would be empty or without feedback.
    """
    count = min(round(fraction * len(split)), MOST_QUERIES)
    if fraction == 0:
        return np.arange(len(split)), np.empty(0, dtype=np.int64)
    if count == 0 or count == len(split):
        raise UserError(
            f"--validation-fraction {fraction}: {len(split)} queries cannot be split by it; "
            "give more queries or another fraction"
        )
    # Queries of one text, as a log of events holds them, stay on one side. What is drawn are texts: of a draw
    # of events, the frequent texts would be held back and hardly any of the others. No more than half of the
    # texts: where one is most of the events, all others would be held back.
    text_of = _text_groups(split)
    sizes = np.bincount(text_of)
    texts = max(1, round(max(fraction, 0.5) * len(sizes)))
    held_back = np.zeros(len(sizes), dtype=bool)
    for text in np.random.default_rng((seed % (1 << 32), 0x5EED)).permutation(len(sizes)):
        if sizes[text] <= count:
            held_back[text] = True
            count, texts = count - sizes[text], texts - 1
        if count == 0 or texts == 0:
            break
    training, validation = np.flatnonzero(~held_back[text_of]), np.flatnonzero(held_back[text_of])
    for rows, what in ((training, "training"), (validation, "held-back")):
        if not np.isin(split.feedback_queries, rows).any():
            raise UserError(
                f"--validation-fraction {fraction}: none of the {len(rows)} {what} queries has feedback "
                f"({split.clicked} of the split's {len(split)} have); give more feedback or another fraction"
            )
    return training, validation


def _text_groups(split: Split) -> np.ndarray:
    """(Q,) int64, the same number for queries of the same text, from 0 in the order of their first ones."""
    numbers: dict[str, int] = {}
    texts = plain_texts(split.query_texts)
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


def known_pairs(split: Split, labels: LabelTable, recall_of: str) -> tuple[np.ndarray, np.ndarray]:
    """(P,) query rows and (P,) catalog rows of the pairs whose recall is measured.

    Feedback that is a log of what the deployed model showed lies in its lists alone, and any other list seems
    to lose recall. "known" therefore adds what the labels call relevant, of whatever rank.
    """
    if recall_of == "feedback":
        return split.feedback_queries, split.feedback_items
    return labels.relevant_and(split.feedback_queries, split.feedback_items)


def measure(
    validation: Validation,
    embeddings: Sequence[np.ndarray],
    search: Callable[[np.ndarray, int, RowLists], np.ndarray],
) -> list[np.ndarray]:
    """Search the validation queries, as several encoders embed them, and compare with the deployed lists.

    All are searched together: a catalog that is too large for the device is passed over once.

    Args:
        validation: the queries and what is known of them.
        embeddings: (V, d) float32 of each encoder.
        search: gives the catalog rows of queries' lists, of their length, without what each leaves out.

    Returns:
        Of each encoder (V, 5) float64 per query: novel items, relevant novel ones, judged novel ones, recall
        and the deployed model's recall, these two NaN where nothing is known to be relevant.
    """
    split, depth = validation.split, validation.base_rows.shape[1]
    left_out = split.excluded.take(np.tile(np.arange(len(split)), len(embeddings)))
    rows = search(np.concatenate(embeddings), depth, left_out)
    return [_compare(validation, found) for found in np.split(rows, len(embeddings))]


def _compare(validation: Validation, rows: np.ndarray) -> np.ndarray:
    split, depth = validation.split, validation.base_rows.shape[1]
    new = novel(rows, validation.pool)
    verdicts = validation.labels.lookup(np.arange(len(split))[:, None], rows)
    figures = (
        new.sum(axis=1),
        (new & (verdicts == RELEVANT)).sum(axis=1),
        (new & (verdicts != UNKNOWN)).sum(axis=1),
        *(recall(*feedback_hits(of, *validation.known), depth) for of in (rows, validation.base_rows)),
    )
    return np.stack([np.asarray(figure, dtype=np.float64) for figure in figures], axis=1)


def judged_top(validation: Validation) -> np.ndarray:
    """Share of what each validation query's deployed top L holds that has a label, (V,) float32."""
    rows = validation.base_rows
    verdicts = validation.labels.lookup(np.arange(len(rows))[:, None], rows)
    return (verdicts != UNKNOWN).mean(axis=1, dtype=np.float32)


def make_point(step: int, figures: np.ndarray, share: float = 1.0, memory: float = 1.0) -> Point:
    """The means of `measure`'s figures over the validation queries that have them."""
    novelty, relevant_novel, judged, mean_recall, base_recall = np.nanmean(figures, axis=0).tolist()
    differences = (figures[:, 3] - figures[:, 4])[~np.isnan(figures[:, 3])]
    error = float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else 0.0
    judged_share = judged / novelty if novelty else 0.0
    likely = relevant_novel + (novelty - judged) * relevant_novel / (judged + _NOT_SURE / len(figures))
    return Point(
        step, novelty, relevant_novel, mean_recall, judged_share, likely, base_recall, error, share, memory
    )


def keeps_budget(point: Point, max_recall_drop: float) -> bool:
    """Whether a checkpoint's recall lies within the budget."""
    return keeps_recall(point.recall, point.base_recall, max_recall_drop)


def best_first(points: list[Point], max_recall_drop: float) -> list[Point]:
    """Points from the best to the worst.

    Those within the recall budget come first, by what relevant novel items are likely, then novel items that
    are not judged, then recall, then fewer steps; then the others, by how little recall they lose. What is
    not judged is not taken for irrelevant: the further an encoder moves, the less of its list has a label.
    The order of two points never depends on a third, so the best so far can be kept as a run goes on.
    """

    def goodness(point: Point) -> tuple[float, ...]:
        if keeps_budget(point, max_recall_drop):
            unjudged = point.novelty * (1 - point.judged_novel)
            return (1, point.likely, unjudged, point.recall, -point.step)
        return (0, point.recall, -point.step)

    return sorted(points, key=goodness, reverse=True)


def steps_to_keep(points: list[Point], max_recall_drop: float, keep: int) -> set[int]:
    """The steps whose weights the best point and the `keep` best are made of; none without points."""
    return {point.step for point in best_first(points, max_recall_drop)[: max(1, keep)]}


def left_for_good(points: list[Point], max_recall_drop: float, patience: int) -> bool:
    """Whether the last `patience` points all lie below the recall budget, and the last below the others."""
    last = points[-patience:]
    return (
        0 < patience == len(last)
        and not any(keeps_budget(point, max_recall_drop) for point in last)
        and last[-1].recall < min((point.recall for point in points[-patience - 1 : -1]), default=math.inf)
    )


def worth_showing(points: list[Point], chosen: Point | None) -> list[Point]:
    """The checkpoints, and of the blends, which may be dozens, the chosen one and those of the Pareto set."""
    best = pareto_set(points)
    return [point for point in points if point.is_checkpoint or point in best or point is chosen]


def pareto_set(points: list[Point]) -> list[Point]:
    """The points that `pareto` says no other beats, in their order."""
    return [point for point, is_best in zip(points, pareto(points), strict=True) if is_best]


def pareto(points: list[Point]) -> list[bool]:
    """Whether no other point is as good in `likely` and in recall; of equals, the first is."""
    figures = [(point.likely, point.recall) for point in points]
    return [
        is_best and mine not in figures[:n]
        for n, (mine, is_best) in enumerate(zip(figures, unbeaten(figures), strict=True))
    ]
