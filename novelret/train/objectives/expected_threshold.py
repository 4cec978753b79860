"""Inclusion probabilities from the threshold that lets K items through on average: CA-PG with less bias.

With Gumbel noise, item a is among the K largest when its exponential clock of rate e^{φ_a} rings before the
(K+1)-th. Replacing that random time by the time t at which K clocks have rung on average gives

    π_K(a) = 1 − exp(−t e^{φ_a}),   Σ_a π_K(a) = K,

a smooth function of the scores without noise of its own. CA-PG's published plug-in sums to more than K; the
one-draw threshold of `gumbel_threshold` is unbiased but noisy. Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEWTON_STEPS = 40


def log_time(top_logits: Tensor, log_rest: Tensor, k: int) -> Tensor:
    """Logarithm of t, (B,), with its gradient in the scores (implicit differentiation).

    Args:
        top_logits: (B, M) the highest scores φ, M > K. The others' clocks ring rarely within t, so that
            1 − exp(−t e^φ) is t e^φ for them and their total mass is enough.
        log_rest: (B,) log-partition of the others alone, −inf where there are none. Not to be had as a
            difference: a peaked policy leaves of it nothing but rounding, and clocks that ring late matter.
        k: K.
    """

    def passed(log_t: Tensor, top: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        rates = torch.exp((top + log_t[:, None]).clamp(max=30))
        mass = torch.exp((rest + log_t).clamp(max=30))
        return -torch.expm1(-rates).sum(dim=1) + mass - k, (rates * torch.exp(-rates)).sum(dim=1) + mass

    with torch.no_grad():
        log_z = torch.logaddexp(torch.logsumexp(top_logits, dim=1), log_rest)
        log_t = torch.log(torch.full_like(log_z, float(k))) - log_z  # never beyond the solution
        for _ in range(_NEWTON_STEPS):
            excess, slope = passed(log_t, top_logits, log_rest)
            log_t = log_t - (excess / slope.clamp_min(1e-30)).clamp(-2, 2)
        _, slope = passed(log_t, top_logits, log_rest)
    # One more Newton step whose slope is held: its value is the solution, its gradient the implicit one.
    excess, _ = passed(log_t, top_logits, log_rest)
    return log_t - excess / slope.clamp_min(1e-30)


def log_inclusion(logits: Tensor, log_t: Tensor) -> Tensor:
    """Logarithm of π_K of items with scores (B, n), given log t (B,)."""
    rates = torch.exp((logits + log_t[:, None]).clamp(max=30))
    return torch.log(-torch.expm1(-rates.clamp_min(1e-30)))


def credited(logits: Tensor, log_t: Tensor, credit: Tensor) -> Tensor:
    """Surrogate loss −Σ_a r(a) log π_K(a) over the drawn items, (B,); scores and credits (B, K)."""
    return -(credit * log_inclusion(logits, log_t)).sum(dim=1)
