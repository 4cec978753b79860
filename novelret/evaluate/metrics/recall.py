"""Recall@k over held-out feedback."""

from __future__ import annotations

import numpy as np

from novelret.evaluate.metrics.membership import feedback_hits


def recall(rows: np.ndarray, feedback_queries: np.ndarray, feedback_items: np.ndarray, k: int) -> np.ndarray:
    """Share of a query's feedback in its top k, per query (trec_eval's recall); NaN without feedback."""
    hits = feedback_hits(rows[:, :k], feedback_queries, feedback_items).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return hits / np.bincount(feedback_queries, minlength=len(rows))
