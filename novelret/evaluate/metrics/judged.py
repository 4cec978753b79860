"""Judged@k, NovelJudged@k: how much of a list the judge has seen. Read them beside every judged metric."""

from __future__ import annotations

import numpy as np

from novelret.label.table import UNKNOWN


def judged(rows: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Share of judged items among the items of the top k, per query; NaN without any."""
    present = (rows[:, :k] >= 0).sum(axis=1)
    return _share((verdicts[:, :k] != UNKNOWN).sum(axis=1), present)


def novel_judged(new: np.ndarray, verdicts: np.ndarray, k: int) -> np.ndarray:
    """Share of judged items among the novel ones of the top k, per query; NaN without any."""
    new = new[:, :k]
    count = new.sum(axis=1)
    seen = (new & (verdicts[:, :k] != UNKNOWN)).sum(axis=1)
    return _share(seen, count)


def _share(some: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(some, of, out=np.full(len(of), np.nan), where=of > 0)
