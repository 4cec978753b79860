"""The policy π(z | q) = softmax over all items of s(q,z)/τ, streamed: memory does not grow with the catalog.

`excluded` are (B, E) catalog rows that a query's policy never selects, −1 padded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from novelret.blocks import BLOCK, Items, block_logits, item_blocks
from novelret.errors import UserError
from novelret.shard import Shard, from_all


def moments(
    queries: Tensor,
    items: Items,
    temperature: float,
    excluded: Tensor | None = None,
    block: int = BLOCK,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-partition log Z(q) = log Σ_z exp(s(q,z)/τ) and the policy's mean item E_π[g(z)], in one pass.

    Args:
        queries: (B, d) embeddings; where items are sharded, the same on every process.
        items: (N, d) embeddings, or this process's share of them.
        temperature: τ.
        excluded: (B, E) int64 catalog rows left out.
        block: items at a time.
        shard: which rows these items are, where processes share the catalog.

    Returns:
        (B,) log-partitions and (B, d) means over the whole catalog, without gradient.

    Raises:
        UserError: every item is left out for some query, or τ is not positive.
    """
    check_temperature(temperature)
    first = 0 if shard is None else shard.first
    highest = queries.new_full((len(queries),), -torch.inf)
    total = queries.new_zeros(len(queries))
    mean = torch.zeros_like(queries)
    with torch.no_grad():
        for start, part in item_blocks(items, queries, block):
            logits = block_logits(queries, part, first + start, temperature, excluded)
            raised = torch.maximum(highest, logits.amax(dim=1))
            # A query that has seen excluded items alone keeps −inf; its sums stay 0 instead of NaN.
            shift = torch.where(torch.isinf(raised), 0.0, raised)
            weights = torch.exp(logits - shift[:, None])
            keep = torch.exp(highest - shift)
            total = total * keep + weights.sum(dim=1)
            mean = mean * keep[:, None] + weights @ part
            highest = raised
        log_z = highest + torch.log(total)
        mean = mean / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
        if shard is not None:
            everyone = torch.logsumexp(from_all(log_z), dim=0)
            mean *= torch.exp(log_z - everyone)[:, None].nan_to_num()
            dist.all_reduce(mean)
            log_z = everyone
    empty = torch.isneginf(log_z)
    if bool(empty.any()):
        raise UserError(f"query {int(empty.nonzero()[0])} of the batch: every item is left out")
    return log_z, mean


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, log_z: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return log_z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None


def with_slope(queries: Tensor, log_z: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """Log-partitions (B,) as a function of the queries (B, d): their gradient is E_π[g(z)]/τ."""
    result: Tensor = _WithSlope.apply(queries, log_z, mean / temperature)
    return result


def entropy_of(queries: Tensor, log_z: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy in nats, (B,): log Z − E[s]/τ, and E[s] is q's product with the mean item."""
    return log_z - (queries * mean).sum(dim=1) / temperature


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: must be above 0")
