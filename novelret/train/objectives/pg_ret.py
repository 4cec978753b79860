"""PG-Ret's binary action (Eq. 8): in state (q, z), select z (a = 1) or do not (a = 0).

The action's reward is R for a = 1 and −R for a = 0, so a state with R > 0 raises log π(1 | q,z) and one
with R < 0 raises log π(0 | q,z) = log(1 − π(1 | q,z)), which stays bounded where −log π(1) would not.
The forms below differ in how π(1 | q,z) is estimated (§4.3, and beyond it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from novelret.train.objectives.lists import log_included


def conservative(score: Tensor, negative_scores: Tensor, reward: Tensor) -> Tensor:
    """Triplet loss with margin 0 against the base model's top item (PG-Ret, §4.3, M = 1).

    R · max(0, s(q,n) − s(q,z)) for R > 0, which vanishes as soon as z outranks n; mirrored for R < 0.

    Args:
        score: (S,) s(q,z).
        negative_scores: (S, 1) s(q,n), n the base model's top item.
        reward: (S,) finite rewards.

    Returns:
        (S,) losses.
    """
    gap = negative_scores[:, 0] - score
    return reward.abs() * torch.relu(torch.sign(reward) * gap)


def contrastive(
    score: Tensor, negative_scores: Tensor, negative_mask: Tensor, reward: Tensor, temperature: float
) -> Tensor:
    """π̂ = exp(s(q,z)/τ) / (exp(s(q,z)/τ) + Σ_m exp(s(q,m)/τ)): aggressive and boundary (PG-Ret, §4.3).

    Aggressive takes the base model's top M as negatives; boundary takes the items just beyond
    rank L: z is retrieved once it outranks those, and need not push out what the list holds.

    Args:
        score: (S,) s(q,z).
        negative_scores: (S, M) s(q,m).
        negative_mask: (S, M) bool, which negatives count.
        reward: (S,) finite rewards.
        temperature: τ.

    Returns:
        (S,) losses, −R log π̂ for R > 0 and −|R| log(1 − π̂) for R < 0.
    """
    against = torch.logsumexp((negative_scores / temperature).masked_fill(~negative_mask, -torch.inf), dim=1)
    # Without any negative there is nothing to outrank, and logsigmoid(inf) would give NaN gradients.
    empty = ~negative_mask.any(dim=1)
    logit = score / temperature - against.masked_fill(empty, 0.0)
    loss = -reward.abs() * logsigmoid(torch.sign(reward) * logit)
    return loss.masked_fill(empty, 0.0)


def inclusion(
    score: Tensor, near_scores: Tensor, near_mask: Tensor, reward: Tensor, temperature: float
) -> Tensor:
    """π̂ = 1 − exp(−exp((s(q,z) − κ)/τ)): z is selected when it enters the top L (CA-PG's inclusion).

    The threshold κ is where the current policy's own list ends: the mean score of items around its rank L.
    It moves with the policy and carries gradient, so a query need not come nearer to z than it has to leave
    what competes for z's place; a mean over ranks spreads that over many items instead of blaming one.

    By this π̂ the loss of a bad item, −log(1 − π̂), would be exp((s − κ)/τ): one well inside the list would
    drown all others of the batch. There the threshold's noise is taken to be logistic, not Gumbel.

    Args:
        score: (S,) s(q,z).
        near_scores: (S, M) scores of items around the policy's rank L, with gradient.
        near_mask: (S, M) bool, which of them count.
        reward: (S,) finite rewards.
        temperature: τ.

    Returns:
        (S,) losses, −R log π̂ for R > 0 and |R| log(1 + exp((s − κ)/τ)) for R < 0; 0 where no item counts.
    """
    counted = near_mask.sum(dim=1)
    threshold = (near_scores * near_mask).sum(dim=1) / counted.clamp_min(1)
    logit = (score - threshold) / temperature
    loss = -reward.abs() * torch.where(reward > 0, log_included(logit), logsigmoid(-logit))
    return loss.masked_fill(counted == 0, 0.0)
