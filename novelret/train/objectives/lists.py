"""What the list objectives share: a Plackett-Luce draw's scores, and log-probabilities from them.

All list objectives maximise E R(S) over ordered draws S of K items without replacement. Each is a pure
function of the drawn items' logits φ = s/τ and of log Z over the whole catalog, both with gradient, so that
they work on any catalog in flat memory. They return surrogate losses per query, whose *gradient* is minus
the estimator; the values mean nothing. Rewards of unknown labels are given as 0: such an item gets no
credit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_remaining(logits: Tensor, log_partition: Tensor) -> Tensor:
    """Log-sum of exp φ over the items left before each draw: log(Z − Σ_{j<k} exp φ_j), (B, K).

    Args:
        logits: (B, K) of the drawn items, in order.
        log_partition: (B,) log Z over all items.
    """
    drawn = torch.logcumsumexp(logits, dim=1)[:, :-1]
    return torch.cat([log_partition[:, None], log_less(log_partition[:, None], drawn)], dim=1)


def log_less(whole: Tensor, part: Tensor) -> Tensor:
    """Logarithm of exp whole − exp part, finite also where rounding says that nothing is left."""
    # When what is left is below the last digits of the whole, it is taken as that digit.
    least = torch.finfo(whole.dtype).eps
    share = (part - whole).clamp(max=-least)
    return whole + torch.log(-torch.expm1(share))


def log_included(margin: Tensor) -> Tensor:
    """Logarithm of 1 − exp(−exp m), the probability of clearing a threshold by Gumbel noise; stable."""
    # Far below, it is m itself; far above, −exp(−exp m), which is 0 in floating point.
    inside = margin.clamp(-15.0, 3.6)
    middle = torch.log(-torch.expm1(-torch.exp(inside)))
    return torch.where(margin < -15.0, margin, middle)
