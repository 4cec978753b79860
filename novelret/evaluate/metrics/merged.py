"""The list as it is deployed: the base model's top L, and then the new model's novel items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from novelret.label.table import RELEVANT, UNKNOWN


@dataclass(frozen=True)
class Merged:
    """Per-query figures of the merged list (PG-Ret, the A/B test).

    Attributes:
        added: (Q,) novel items that the new model adds.
        density: (Q,) relevant items in the merged list.
        covered: (Q,) bool, whether there is any.
        judged: (Q,) share of its items that are judged; NaN where it has none.
    """

    added: np.ndarray
    density: np.ndarray
    covered: np.ndarray
    judged: np.ndarray


def merge(
    new: np.ndarray,
    verdicts: np.ndarray,
    base: np.ndarray,
    base_verdicts: np.ndarray,
    budget: int | None = None,
) -> Merged:
    """Merge a model's novel items behind the deployed lists.

    Args:
        new: (Q, k) bool, which places of the new model's lists hold a novel item (see `novel`).
        verdicts: (Q, k) of the new model's lists.
        base: (Q, L) the deployed lists, −1 padded.
        base_verdicts: (Q, L) of these.
        budget: at most so many novel items are added per query, the best ones; all k places where None.
    """
    if budget is not None:
        new = new & (new.cumsum(axis=1) <= budget)
    added = new.sum(axis=1)
    density = (base_verdicts == RELEVANT).sum(axis=1) + (new & (verdicts == RELEVANT)).sum(axis=1)
    judged = (base_verdicts != UNKNOWN).sum(axis=1) + (new & (verdicts != UNKNOWN)).sum(axis=1)
    lengths = (base >= 0).sum(axis=1) + added
    share = np.divide(judged, lengths, out=np.full(len(new), np.nan), where=lengths > 0)
    return Merged(added, density, density > 0, share)
