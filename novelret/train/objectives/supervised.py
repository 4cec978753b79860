"""InfoNCE (PG-Ret, Eq. 1): the supervised baseline and the feedback term."""

from __future__ import annotations

import torch
from torch import Tensor


def infonce(scores: Tensor, positive: Tensor, known_positive: Tensor, temperature: float) -> Tensor:
    """−log softmax of the positive among the items of the columns, per example.

    Args:
        scores: (S, B) cosines of each query with an item a column: the batch's, as published, or a sample of
            the catalog, where τ log n is added to the score of an item that stands for n.
        positive: (S,) int64, column of each query's positive.
        known_positive: (S, B) bool, columns known to be relevant to the query; those other than the
            positive itself are no negatives and are left out. Repeats of the positive's item belong here.
        temperature: softmax temperature τ.

    Returns:
        (S,) losses.
    """
    own = torch.zeros_like(known_positive).scatter_(1, positive[:, None], True)
    logits = (scores / temperature).masked_fill(known_positive & ~own, -torch.inf)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, positive[:, None]).squeeze(1)
