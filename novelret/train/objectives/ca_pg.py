"""Credit-assigned policy gradient as published (arXiv 2605.26385): r(a) ∇ log π_K(a) of each candidate.

π_K(a) = P(a ∈ S) is put together from the K highest scores by a plug-in that is biased: Σ_a π_K(a) comes out
above K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from novelret.train.objectives.lists import log_remaining


def plug_in(
    logits: Tensor,
    log_rest: Tensor,
    credit: Tensor,
    top_logits: Tensor,
    is_top: Tensor,
) -> Tensor:
    """CA-PG: Σ_{a ∈ S} r(a) ∇ log π_K(a).

    π_K(a) = 1 − Π_{k=1..K} (1 − p_k(a)), p_k(a) = e^φ_a / (Z − Σ_{j<k} e^φ_σ(j)), σ the items other than a
    by descending score.

    Args:
        logits: (B, K) of items drawn without replacement, with gradient.
        log_rest: (B,) log-partition of all items but the K highest, with gradient.
        credit: (B, K) rewards, with or without a baseline taken away; 0 where unknown.
        top_logits: (B, K) the K highest logits of the catalog, descending, with gradient.
        is_top: (B, K, K) bool, whether drawn item i is the catalog's j-th best.

    Returns:
        (B,) surrogate losses.
    """
    return -(credit * log_inclusion(logits, log_rest, top_logits, is_top)).sum(dim=1)


def log_inclusion(logits: Tensor, log_rest: Tensor, top_logits: Tensor, is_top: Tensor) -> Tensor:
    """Log-probability log π_K(a) of the plug-in for each drawn item, (B, K)."""
    # An item that is itself among the best is left until the end: only others are removed before place k.
    last = torch.argsort(is_top.to(torch.int8), dim=2, stable=True)
    ordered = top_logits[:, None, :].expand_as(last).gather(2, last)
    left = log_remaining(ordered, log_rest[:, None].expand(-1, logits.shape[1]))
    # a's own mass is always among what is left, so p_k ≤ 1 up to rounding.
    log_p = (logits[:, :, None] - left).clamp(max=-torch.finfo(logits.dtype).eps)
    # log(1 − p): either form loses all digits of what is small in it, p or 1 − p.
    small = log_p < -1
    log_kept = torch.where(
        small, torch.log1p(-log_p.exp()), torch.log(-torch.expm1(torch.where(small, -1, log_p)))
    )
    log_missed = log_kept.sum(dim=2)
    return torch.log(-torch.expm1(log_missed.clamp(max=-torch.finfo(logits.dtype).tiny)))


def with_replacement(logits: Tensor, log_partition: Tensor, reward: Tensor) -> Tensor:
    """CA-PG-SwR, also TOP1: Σ_{a ∈ S} r(a) ∇ log p(a). Biased; log Z is of all items."""
    return -(reward * (logits - log_partition[:, None])).sum(dim=1)


def leave_one_out(reward: Tensor, known: Tensor) -> Tensor:
    """Mean known reward of the other candidates of the list, (B, K); 0 where no other is known.

    Args:
        reward: (B, K), 0 where unknown.
        known: (B, K) bool.
    """
    others = known.sum(dim=1, keepdim=True) - known.to(torch.int64)
    return (reward.sum(dim=1, keepdim=True) - reward) / others.clamp_min(1)
