"""nDCG@k over held-out feedback, each pair with gain 1."""

from __future__ import annotations

import numpy as np


def ndcg(hits: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    """Σ_i hit_i / log₂(i + 1) over the same of an ideal list, per query (Järvelin and Kekäläinen, 2002).

    NaN for a query without feedback. Arguments as for `recall`.
    """
    top = hits[:, :k]
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    # Hits are few: adding up where they are needs no (Q, k) array of floats.
    queries, places = np.nonzero(top)
    gain = np.bincount(queries, discount[places], minlength=len(hits))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    with np.errstate(invalid="ignore"):
        return gain / ideal[np.minimum(known, k)]
