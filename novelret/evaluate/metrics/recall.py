"""Recall@k over held-out feedback, or over all that is known to be relevant."""

from __future__ import annotations

import numpy as np

RECALLS = ("feedback", "known")
"""What a recall budget may count."""
LOGGED_RECALL = 0.97
"""Feedback gathered from the deployed lists alone lies in them: from here on their recall of it says so."""


def recall(hits: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    """Share of a query's feedback in its top k, per query (trec_eval's recall); NaN without feedback.

    Args:
        hits: (Q, K) bool, which places of the lists hold feedback of their query (see `feedback_hits`).
        known: (Q,) how much feedback each query has.
        k: cut of the lists.

    Returns:
        (Q,) float64.
    """
    with np.errstate(invalid="ignore"):
        return hits[:, :k].sum(axis=1) / known
