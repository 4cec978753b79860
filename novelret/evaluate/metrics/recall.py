"""Recall@k over held-out feedback, or over all that is known to be relevant."""

from __future__ import annotations

import numpy as np

from novelret.membership import feedback_hits

RECALLS = ("feedback", "known")
"""What a recall budget may count."""
LOGGED_RECALL = 0.97
"""Feedback gathered from the deployed lists alone lies in them: from here on their recall of it says so."""


def recall(rows: np.ndarray, feedback_queries: np.ndarray, feedback_items: np.ndarray, k: int) -> np.ndarray:
    """Share of a query's feedback in its top k, per query (trec_eval's recall); NaN without feedback.

    Args:
        rows: (Q, K) int64 lists of catalog rows, −1 padded.
        feedback_queries: (P,) int64 ascending query rows.
        feedback_items: (P,) int64 catalog rows.
        k: cut of the lists.

    Returns:
        (Q,) float64.
    """
    hits = feedback_hits(rows[:, :k], feedback_queries, feedback_items).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return hits / np.bincount(feedback_queries, minlength=len(rows))
