"""Precision@k by a judge."""

from __future__ import annotations

import numpy as np

from novelret.label.table import RELEVANT, UNKNOWN

ENOUGH_JUDGED = 0.95
"""Share of the items counted from which on a count of relevant ones is taken for measured."""


def precision(verdicts: np.ndarray, k: int) -> np.ndarray:
    """Share of relevant items among the judged ones of the top k, per query; NaN where none is judged.

    Where everything is judged this is the usual relevant / k. Items that are not judged are left out
    instead of called irrelevant, which would punish a model for finding what nobody has looked at.

    Args:
        verdicts: (Q, K) int8, the judge's word on each place of the lists (see `label.table`).
        k: cut of the lists.

    Returns:
        (Q,) float64.
    """
    top = verdicts[:, :k]
    judged = (top != UNKNOWN).sum(axis=1)
    relevant = (top == RELEVANT).sum(axis=1)
    return np.divide(relevant, judged, out=np.full(len(top), np.nan), where=judged > 0)
