"""How far an exported encoder is from the original."""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-4
"""Largest difference of a number in two embeddings that counts as none."""
SAMPLES = ("a", "grey settee", "What is the best " + "very " * 40 + "long question?", "007 ünïcödé 家具")
"""Texts by which an export is compared with the original."""


def difference_of(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest between two arrays of embeddings."""
    return float(np.abs(found - expected).max())
