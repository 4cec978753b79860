"""The list as it is deployed: the base model's top L, and then the new model's novel items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from novelret.evaluate.metrics.novelty import novel
from novelret.label.table import RELEVANT


@dataclass(frozen=True)
class Merged:
    """Per-query figures of the merged list (PG-Ret, the A/B test).

    Attributes:
        added: (Q,) novel items that the new model adds.
        density: (Q,) relevant items in the merged list.
        covered: (Q,) bool, whether there is any.
    """

    added: np.ndarray
    density: np.ndarray
    covered: np.ndarray


def merge(
    rows: np.ndarray,
    base: np.ndarray,
    verdicts: np.ndarray,
    base_verdicts: np.ndarray,
    budget: int | None = None,
) -> Merged:
    """Merge a model's novel items behind the deployed lists.

    Args:
        rows: (Q, k) the new model's lists, best first.
        base: (Q, L) the deployed lists.
        verdicts: (Q, k) of `rows`.
        base_verdicts: (Q, L) of `base`.
        budget: at most so many novel items are added per query, the best ones; all k places where None.
    """
    new = novel(rows, base, rows.shape[1])
    if budget is not None:
        new &= new.cumsum(axis=1) <= budget
    density = (base_verdicts == RELEVANT).sum(axis=1) + (new & (verdicts == RELEVANT)).sum(axis=1)
    return Merged(new.sum(axis=1), density, density > 0)
