"""REINFORCE: item-wise (PG-Ret, §4.1) and over whole lists (PG-Ret, Eq. 2 to 4; V-PG in the CA-PG paper)."""

from __future__ import annotations

from torch import Tensor

from novelret.train.objectives.lists import log_remaining


def item_wise(logits: Tensor, log_partition: Tensor, reward: Tensor) -> Tensor:
    """R(z) ∇ log π(z), averaged over independent draws (PG-Ret, §4.1).

    Args:
        logits: (B, n) s/τ of items drawn with replacement, with gradient.
        log_partition: (B,) log Z, with gradient.
        reward: (B, n), 0 where unknown.

    Returns:
        (B,) surrogate losses; unbiased for E R(z).
    """
    return -(reward * (logits - log_partition[:, None])).mean(dim=1)


def top_k(logits: Tensor, log_rest: Tensor, reward: Tensor) -> Tensor:
    """R(S) ∇ log P(S), P the joint Plackett-Luce probability of the ordered list (Eq. 4; V-PG).

    Args:
        logits: (B, K) of items drawn without replacement, in order, with gradient.
        log_rest: (B,) log-partition of all other items, with gradient.
        reward: (B,) R(S).

    Returns:
        (B,) surrogate losses; unbiased for E R(S), with a variance that grows with K.
    """
    return -reward * (logits - log_remaining(logits, log_rest)).sum(dim=1)


def top_k_with_replacement(logits: Tensor, log_partition: Tensor, reward: Tensor) -> Tensor:
    """R(S) ∇ Σ_k log p(a_k): the list as if drawn with replacement (V-PG-SwR); biased.

    As `top_k`, but for the (B,) log Z of all items.
    """
    return -reward * (logits - log_partition[:, None]).sum(dim=1)
