"""The swap estimator: unbiased for any reward of the set, by what each item adds over the first left out."""

from __future__ import annotations

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
