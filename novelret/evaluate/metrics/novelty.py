"""Novelty@k and RelevantNovel@k: what a list brings that the deployed system does not already return."""

from __future__ import annotations

import numpy as np

from novelret.label.table import RELEVANT, UNKNOWN
from novelret.membership import is_in


def novelty(rows: np.ndarray, base: np.ndarray, k: int) -> np.ndarray:
    """Items of Top_k(q) that T_L(q) lacks, per query (PG-Ret, Definition 1): a count from 0 to k, no share.

    Args:
        rows: (Q, K) int64 lists of catalog rows, −1 padded.
        base: (Q, L) the deployed model's top-L lists, or the union of several models' (−1 padded).
        k: cut of the lists; L need not equal it.

    Returns:
        (Q,) int64.
    """
    return novel(rows, base, k).sum(axis=1)


def relevant_novelty(rows: np.ndarray, base: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Number of items in the top k that are novel and judged relevant, per query.

    What is not judged counts as not relevant, so this is a lower bound: read NovelJudged@k beside it.

    Args:
        rows: (Q, K) int64 lists of catalog rows, −1 padded.
        base: (Q, L), as for `novelty`.
        verdicts: (Q, K) int8, the judge's word on each place of the lists (see `label.table`).
        k: cut of the lists.

    Returns:
        (Q,) int64.
    """
    return (novel(rows, base, k) & (verdicts[:, :k] == RELEVANT)).sum(axis=1)


def novel_precision(rows: np.ndarray, base: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Share of relevant items among the judged novel ones of the top k, (Q,) float64; NaN without any.

    Arguments as for `relevant_novelty`.
    """
    new, top = novel(rows, base, k), verdicts[:, :k]
    judged = (new & (top != UNKNOWN)).sum(axis=1)
    relevant = (new & (top == RELEVANT)).sum(axis=1)
    return np.divide(relevant, judged, out=np.full(len(rows), np.nan), where=judged > 0)


def novel(rows: np.ndarray, base: np.ndarray, k: int) -> np.ndarray:
    """Which of the first k places hold a novel item; bool (Q, k)."""
    top = rows[:, :k]
    return ~is_in(top, base) & (top >= 0)
