"""PL-Rank (Oosterhuis, SIGIR 2022), every place up to K weighing 1: unbiased for additive rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from novelret.train.objectives.lists import log_remaining


def pl_rank_3(
    logits: Tensor,
    log_rest: Tensor,
    reward: Tensor,
    rewarded_logits: Tensor,
    rewarded: Tensor,
    place: Tensor,
) -> Tensor:
    """PL-Rank-3: the expectation over the item at each place is taken exactly instead of by the draw.

    ∇φ_d of an item d at place j (K + 1 if it was not drawn) gets Σ_{k>j} r(y_k) + Σ_{k≤j} π(d | y_<k) (r(d) −
    Σ_{x≥k} r(y_x)). The part without r(d) is the gradient of the log-partitions of what is left, so it is
    taken over the whole catalog through these alone; the part with it needs every item that has a reward,
    drawn or not.

    Args:
        logits: (B, K) of items drawn without replacement, in order, with gradient.
        log_rest: (B,) log-partition of all other items, with gradient.
        reward: (B, K) of the drawn items, 0 where unknown.
        rewarded_logits: (B, M) of all items known to have a reward other than 0, with gradient.
        rewarded: (B, M) their rewards, 0 for padding.
        place: (B, M) int64, where each of them was drawn, K where it was not, −1 for padding.

    Returns:
        (B,) surrogate losses, unbiased.
    """
    k = logits.shape[1]
    left = log_remaining(logits, log_rest)
    to_go = reward.flip(1).cumsum(dim=1).flip(1)
    after = to_go - reward
    available = torch.arange(k, device=place.device)[None, None] <= place[:, :, None]
    chance = torch.exp(rewarded_logits[:, :, None] - left[:, None, :]).masked_fill(~available, 0.0).sum(dim=2)
    value = (after * logits).sum(dim=1) - (to_go * left).sum(dim=1)
    return -(value + (chance.detach() * rewarded * rewarded_logits).sum(dim=1))
