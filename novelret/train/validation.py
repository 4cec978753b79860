"""Validation during training, and which checkpoint it chooses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from novelret.data.split import Split
from novelret.errors import UserError
from novelret.evaluate.metrics import recall
from novelret.evaluate.metrics.novelty import novel
from novelret.index import Index
from novelret.label.table import RELEVANT, UNKNOWN, LabelTable

MOST_QUERIES = 2_000
"""A validation search costs one pass over the catalog; more queries than this do not sharpen it much."""


@dataclass(frozen=True)
class Validation:
    """Held-back queries and what is known of them.

    Attributes:
        split: the held-back queries with their feedback.
        base_rows: (V, L) int64, the deployed top-L lists.
        labels: verdicts by (validation query row, catalog row).
    """

    split: Split
    base_rows: np.ndarray
    labels: LabelTable


@dataclass(frozen=True)
class Point:
    """One checkpoint on the validation queries: a point of the novelty–recall frontier.

    Attributes:
        step: optimizer steps taken.
        novelty: mean number of items in the top L that the deployed top L does not hold (Definition 1).
        relevant_novel: mean number of those that are judged relevant.
        recall: mean per-query share of held-out feedback in the top L.
        judged_novel: share of the novel items that are judged at all.
    """

    step: int
    novelty: float
    relevant_novel: float
    recall: float
    judged_novel: float


def hold_back(split: Split, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and validation queries, each ascending.

    Raises:
        UserError: one of the two would be empty.
    """
    count = min(round(fraction * len(split)), MOST_QUERIES)
    if fraction == 0:
        return np.arange(len(split)), np.empty(0, dtype=np.int64)
    if count == 0 or count == len(split):
        raise UserError(
            f"--validation-fraction {fraction}: {len(split)} queries cannot be split by it; "
            "give more queries or another fraction"
        )
    order = np.random.default_rng((seed % (1 << 32), 0x5EED)).permutation(len(split))
    return np.sort(order[count:]), np.sort(order[:count])


def measure(validation: Validation, embeddings: np.ndarray, index: Index, step: int, device: str) -> Point:
    """Search the validation queries and compare with the deployed lists."""
    split = validation.split
    depth = validation.base_rows.shape[1]
    rows, _ = index.search(embeddings, depth, split.excluded, device=device)
    new = novel(rows, validation.base_rows, depth)
    verdicts = validation.labels.lookup(np.arange(len(split))[:, None], rows)
    return Point(
        step,
        float(new.sum(axis=1).mean()),
        float((new & (verdicts == RELEVANT)).sum(axis=1).mean()),
        mean_recall(rows, split),
        float((verdicts[new] != UNKNOWN).mean()) if new.any() else 0.0,
    )


def mean_recall(rows: np.ndarray, split: Split) -> float:
    """Mean per-query share of feedback in whole lists (V, k)."""
    return float(recall(rows, split.feedback_queries, split.feedback_items, rows.shape[1]).mean())


def choose(points: list[Point], base_recall: float, max_recall_drop: float) -> Point:
    """The point with most relevant novel items whose recall stays within the budget.

    Where no point keeps the budget, the one that loses least. Ties go to more novelty, then fewer steps.
    """
    floor = base_recall * (1 - max_recall_drop)
    inside = [point for point in points if point.recall >= floor - 1e-12]
    if not inside:
        return max(points, key=lambda point: (point.recall, -point.step))
    return max(inside, key=lambda point: (point.relevant_novel, point.novelty, -point.step))
