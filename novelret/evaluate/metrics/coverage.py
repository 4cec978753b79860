"""Catalog coverage: how much of the catalog the lists reach."""

from __future__ import annotations

import numpy as np


def catalog_coverage(rows: np.ndarray, k: int, catalog_size: int) -> float:
    """Share of the catalog's items that are in some query's top k."""
    top = rows[:, :k]
    return len(np.unique(top[top >= 0])) / catalog_size
