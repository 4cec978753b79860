"""Novelty@k and RelevantNovel@k: what a list brings that the deployed system does not already return."""

from __future__ import annotations

import numpy as np

from novelret.label.table import RELEVANT, UNKNOWN
from novelret.membership import is_in


def novel(rows: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Which places of the lists hold an item that T_L(q) lacks (PG-Ret, Definition 1).

    Args:
        rows: (Q, K) int64 lists of catalog rows, −1 padded.
        base: (Q, L) the deployed model's top-L lists, or the union of several models' (−1 padded); L need
            not equal K.

    Returns:
        (Q, K) bool.
    """
    return ~is_in(rows, base) & (rows >= 0)


def novelty(new: np.ndarray, k: int) -> np.ndarray:
    """Novel items of the top k, per query (PG-Ret, Definition 1): a count from 0 to k, no share.

    Args:
        new: (Q, K) bool, which places hold a novel item (see `novel`).
        k: cut of the lists.

    Returns:
        (Q,) int64.
    """
    return new[:, :k].sum(axis=1)


def relevant_novelty(new: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Number of items in the top k that are novel and judged relevant, per query.

    What is not judged counts as not relevant, so this is a lower bound: read NovelJudged@k beside it.

    Args:
        new: (Q, K) bool, which places hold a novel item (see `novel`).
        verdicts: (Q, K) int8, the judge's word on each place of the lists (see `label.table`).
        k: cut of the lists.

    Returns:
        (Q,) int64.
    """
    return (new[:, :k] & (verdicts[:, :k] == RELEVANT)).sum(axis=1)


def novel_precision(new: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Share of relevant items among the judged novel ones of the top k, (Q,) float64; NaN without any.

    Arguments as for `relevant_novelty`.
    """
    new, top = new[:, :k], verdicts[:, :k]
    judged = (new & (top != UNKNOWN)).sum(axis=1)
    relevant = (new & (top == RELEVANT)).sum(axis=1)
    return np.divide(relevant, judged, out=np.full(len(new), np.nan), where=judged > 0)
