"""Reciprocal rank over held-out feedback."""

from __future__ import annotations

import numpy as np


def reciprocal_rank(hits: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first feedback item in the top k, 0 where none is, (Q,) float64; NaN without feedback.

    What MS MARCO ranks by (MRR@10). Arguments as for `recall`.
    """
    hits = hits[:, :k]
    found = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0)
    return np.where(known > 0, found, np.nan)
