"""The policy π(z | q) = softmax over all items of s(q,z)/τ, streamed: memory does not grow with the catalog.

Items come as a (N, d) numpy array, memory-mapped or not, or as a tensor that may live on a GPU; float32,
float16 or bfloat16. Blocks are turned into the queries' dtype one at a time. `excluded` are (B, E) catalog
rows that a query's policy never selects, −1 padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from novelret.errors import UserError
from novelret.train.shard import Shard, from_all

BLOCK = 16_384
"""Items at a time."""

Items = np.ndarray | Tensor


def item_blocks(items: Items, like: Tensor, block: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
    """(first row, (n, d) block) over all items, in the dtype and on the device of `like`."""
    for start in range(0, len(items), block):
        yield start, rows_to_tensor(items[start : start + block], like)


def rows_to_tensor(rows: Items, like: Tensor) -> Tensor:
    """Some item rows in the dtype and on the device of `like`."""
    if isinstance(rows, Tensor):
        return rows.to(like.device, like.dtype)
    with warnings.catch_warnings():
        # torch warns of read-only memory maps; nothing here writes to them
        warnings.simplefilter("ignore", UserWarning)
        wrapped = torch.from_numpy(rows)
    return wrapped.to(like.device, like.dtype)


def block_logits(
    queries: Tensor,
    block: Tensor,
    start: int,
    temperature: float,
    excluded: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """(B, n) logits s/τ of one block, −inf where an item is excluded; written to `out` where it is given."""
    logits = torch.mm(queries / temperature, block.T, out=out)
    if excluded is not None:
        inside = (excluded >= start) & (excluded < start + len(block))
        least = torch.where(inside, -torch.inf, torch.inf).to(logits.dtype)
        # Without asking how many are inside, for which a GPU would have to be waited for at every block.
        logits.scatter_reduce_(1, (excluded - start).clamp(0, len(block) - 1), least, "amin")
    return logits


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
            everyone = torch.logsumexp(from_all(log_z, shard), dim=0)
            mean *= torch.exp(log_z - everyone)[:, None].nan_to_num()
            dist.all_reduce(mean, group=shard.group)
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


def log_partition(
    queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None, block: int = BLOCK
) -> Tensor:
    """Log-partition log Z(q), (B,), with its gradient in the queries."""
    log_z, mean = moments(queries.detach(), items, temperature, excluded, block)
    return with_slope(queries, log_z, mean, temperature)


def check_embeddings(items: Items, *, normalized: bool, what: str, tolerance: float = 1e-2) -> None:
    """Refuse a matrix with values that are not finite or, where scores are cosines, of a length other than 1.

    0 is a length, too: an encoder may know none of an item's words. Done once before training, not at every
    step.

    Raises:
        UserError: names the first bad row.
    """
    like = torch.zeros(1)
    for start, block in item_blocks(items, like):
        length = block.norm(dim=1)
        bad = ~torch.isfinite(length)
        if bool(bad.any()):
            raise UserError(f"{what}: row {start + int(bad.nonzero()[0])} holds values that are not finite")
        bad = ((length - 1).abs() > tolerance) & (length > 0)
        if normalized and bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise UserError(
                f"{what}: row {start + first} has length {float(length[first]):.4f}, not 1, though scores "
                "are cosines; make the index again"
            )


def top_k(
    queries: Tensor,
    items: Items,
    k: int,
    excluded: Tensor | None = None,
    block: int = BLOCK,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items with the highest scores under the current policy, (B, k) rows and scores, no gradient.

    Sharded as in `moments`.

    Raises:
        UserError: a query has fewer than k items.
    """
    first = 0 if shard is None else shard.first
    rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    scores = queries.new_empty((len(queries), 0))
    with torch.no_grad():
        for start, part in item_blocks(items, queries, block):
            found = block_logits(queries, part, first + start, 1.0, excluded)
            best = torch.topk(found, min(k, found.shape[1]), dim=1)
            rows = torch.cat([rows, best.indices + first + start], dim=1)
            top = torch.topk(torch.cat([scores, best.values], dim=1), min(k, rows.shape[1]), dim=1)
            rows, scores = rows.gather(1, top.indices), top.values
        if shard is not None:
            short = k - scores.shape[1]
            rows, scores = (
                torch.nn.functional.pad(rows, (0, short), value=-1),
                torch.nn.functional.pad(scores, (0, short), value=-torch.inf),
            )
            rows, scores = (from_all(x, shard).movedim(0, 1).flatten(1) for x in (rows, scores))
            top = torch.topk(scores, k, dim=1)
            rows, scores = rows.gather(1, top.indices), top.values
    if scores.shape[1] < k or bool(torch.isneginf(scores[:, -1]).any()):
        raise UserError(f"fewer than {k} items are left for some query of the batch; lower the list's size")
    return rows, scores


def entropy_of(queries: Tensor, log_z: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy in nats, (B,): log Z − E[s]/τ, and E[s] is q's product with the mean item."""
    return log_z - (queries * mean).sum(dim=1) / temperature


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: must be above 0")
