"""Inclusion by a Gumbel threshold: an unbiased CA-PG for additive rewards."""

from __future__ import annotations

from torch import Tensor

from novelret.train.objectives.lists import log_included


def pathwise(logits: Tensor, next_logit: Tensor, threshold: Tensor, reward: Tensor) -> Tensor:
    """Σ_{a ∈ S} r(a) ∇ log π̂_K(a), π̂_K(a) = 1 − exp(−exp(φ_a − κ)).

    κ, the K-th largest perturbed score among the items other than a, is for every drawn a that of the item
    left out first, (K + 1)-th of the draw. Given κ, a is drawn with probability π̂_K(a); the gradient flows
    through κ = φ + noise too, which makes the expectation exactly that of E Σ_{a ∈ S} r(a).

    Args:
        logits: (B, K) of the drawn items, with gradient.
        next_logit: (B,) φ of the (K + 1)-th item, with gradient.
        threshold: (B,) its perturbed score κ.
        reward: (B, K), 0 where unknown.

    Returns:
        (B,) surrogate losses.
    """
    moving = threshold + next_logit - next_logit.detach()
    return -(reward * log_included(logits - moving[:, None])).sum(dim=1)
