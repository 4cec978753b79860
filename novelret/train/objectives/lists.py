"""What the list objectives share: a Plackett-Luce draw's scores, and log-probabilities from them.

All list objectives maximise E R(S) over ordered draws S of K items without replacement. Each is a pure
function of the drawn items' logits φ = s/τ and of a log-partition over the catalog, or over what it holds
beside them, both with gradient, so that they work on any catalog in flat memory. They return surrogate losses
per query, whose *gradient* is minus the estimator; the values mean nothing. Rewards of unknown labels are
given as 0: such an item gets no credit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = -1e30  # its exponential is 0, and gradients stay numbers where log 0 would give none


def log_remaining(logits: Tensor, log_rest: Tensor) -> Tensor:
    """Log-sum of exp φ over the items left before each draw: log(rest + Σ_{j≥k} exp φ_j), (…, K).

    Summed up from the rest and never taken away from the whole: of a peaked policy the first draws are all of
    the whole but its last digits.

    Args:
        logits: (…, K) of the drawn items, in order.
        log_rest: (…) log of Σ exp φ over the items that are not among them; −inf where there are none.
    """
    finite = log_rest.clamp_min(_NOTHING)[..., None]
    return torch.logcumsumexp(torch.cat([finite, logits.flip(-1)], dim=-1), dim=-1)[..., 1:].flip(-1)


def log_included(margin: Tensor) -> Tensor:
    """Logarithm of 1 − exp(−exp m), the probability of clearing a threshold by Gumbel noise; stable."""
    # Far below, it is m itself; far above, −exp(−exp m), which is 0 in floating point.
    inside = margin.clamp(-15.0, 3.6)
    middle = torch.log(-torch.expm1(-torch.exp(inside)))
    return torch.where(margin < -15.0, margin, middle)
