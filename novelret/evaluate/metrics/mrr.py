"""Reciprocal rank over held-out feedback."""

from __future__ import annotations

import numpy as np

from novelret.membership import feedback_hits


def reciprocal_rank(
    rows: np.ndarray, feedback_queries: np.ndarray, feedback_items: np.ndarray, k: int
) -> np.ndarray:
    """1 / rank of the first feedback item in the top k, 0 where none is, (Q,) float64; NaN without feedback.

    What MS MARCO ranks by (MRR@10). Arguments as for `recall`.
    """
    hits = feedback_hits(rows[:, :k], feedback_queries, feedback_items)
    found = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0)
    return np.where(np.bincount(feedback_queries, minlength=len(rows)) > 0, found, np.nan)
