"""The swap estimator: unbiased for any reward of the set, by what each item adds over the first left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from novelret.train.objectives.lists import log_included


def swap(logits: Tensor, threshold: Tensor, gain: Tensor) -> Tensor:
    """Σ_{j ∈ S} [R(S) − R(S with j swapped for the (K+1)-th item)] ∇ log π̂(j), π̂ = 1 − exp(−exp(φ_j − κ)).

    The bracket is j's marginal contribution, with the first item left out as its own baseline; κ is that
    item's perturbed score, held fixed.

    Args:
        logits: (B, K) of the drawn items, with gradient.
        threshold: (B,) κ.
        gain: (B, K) the brackets; see `additive_gain` for rewards that add up over items.

    Returns:
        (B,) surrogate losses; unbiased for E R(S), whatever R.
    """
    return -(gain * log_included(logits - threshold.detach()[:, None])).sum(dim=1)


def additive_gain(reward: Tensor, next_reward: Tensor) -> Tensor:
    """Brackets for R(S) = Σ r(a): r(j) − r of the (K+1)-th item, (B, K)."""
    return reward - next_reward[:, None]


def set_gain(rows: Tensor, next_row: Tensor, set_reward: Callable[[Tensor], Tensor]) -> Tensor:
    """Brackets for any set reward, by calling it on the drawn list and on its K swaps.

    Args:
        rows: (B, K) drawn items, in order.
        next_row: (B,) the (K+1)-th item.
        set_reward: (B, K) rows → (B,) rewards.
    """
    whole = set_reward(rows)
    gains = []
    for j in range(rows.shape[1]):
        swapped = rows.clone()
        swapped[:, j] = next_row
        gains.append(whole - set_reward(swapped))
    return torch.stack(gains, dim=1)
