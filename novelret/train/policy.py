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
from torch import Tensor

from novelret.errors import UserError

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
        query, column = inside.nonzero(as_tuple=True)
        logits[query, excluded[query, column] - start] = -torch.inf
    return logits


def moments(
    queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Log-partition log Z(q) = log Σ_z exp(s(q,z)/τ) and the policy's mean item E_π[g(z)], in one pass.

    Args:
        queries: (B, d) embeddings.
        items: (N, d) embeddings.
        temperature: τ.
        excluded: (B, E) int64 rows left out.
        block: items at a time.

    Returns:
        (B,) log-partitions and (B, d) means, without gradient.

    Raises:
        UserError: every item is left out for some query, or τ is not positive.
    """
    check_temperature(temperature)
    highest = queries.new_full((len(queries),), -torch.inf)
    total = queries.new_zeros(len(queries))
    mean = torch.zeros_like(queries)
    with torch.no_grad():
        for start, part in item_blocks(items, queries, block):
            logits = block_logits(queries, part, start, temperature, excluded)
            raised = torch.maximum(highest, logits.amax(dim=1))
            # A query that has seen excluded items alone keeps −inf; its sums stay 0 instead of NaN.
            shift = torch.where(torch.isinf(raised), 0.0, raised)
            weights = torch.exp(logits - shift[:, None])
            keep = torch.exp(highest - shift)
            total = total * keep + weights.sum(dim=1)
            mean = mean * keep[:, None] + weights @ part
            highest = raised
    if bool((total == 0).any()):
        raise UserError(f"query {int((total == 0).nonzero()[0])} of the batch: every item is left out")
    return highest + torch.log(total), mean / total[:, None]


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Items, temperature: float, excluded: Tensor | None, block: int
    ) -> Tensor:
        log_z, mean = moments(queries.detach(), items, temperature, excluded, block)
        ctx.save_for_backward(mean / temperature)
        return log_z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None, None


def log_partition(
    queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None, block: int = BLOCK
) -> Tensor:
    """Log-partition log Z(q), (B,), with its gradient E_π[g(z)]/τ in the queries (see `moments`)."""
    result: Tensor = _LogPartition.apply(queries, items, temperature, excluded, block)
    return result


def check_embeddings(items: Items, *, normalized: bool, what: str, tolerance: float = 1e-2) -> None:
    """Refuse a matrix with values that are not finite or, where scores are cosines, of a length other than 1.

    Done once before training, not at every step.

    Raises:
        UserError: names the first bad row.
    """
    like = torch.zeros(1)
    for start, block in item_blocks(items, like):
        length = block.norm(dim=1)
        bad = ~torch.isfinite(length)
        if bool(bad.any()):
            raise UserError(f"{what}: row {start + int(bad.nonzero()[0])} holds values that are not finite")
        bad = (length - 1).abs() > tolerance
        if normalized and bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise UserError(
                f"{what}: row {start + first} has length {float(length[first]):.4f}, not 1, though scores "
                "are cosines; make the index again"
            )


def top_k(
    queries: Tensor, items: Items, k: int, excluded: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The k items with the highest scores under the current policy, (B, k) rows and scores, no gradient.

    Raises:
        UserError: a query has fewer than k items.
    """
    rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    scores = queries.new_empty((len(queries), 0))
    with torch.no_grad():
        for start, part in item_blocks(items, queries, block):
            found = block_logits(queries, part, start, 1.0, excluded)
            best = torch.topk(found, min(k, found.shape[1]), dim=1)
            rows = torch.cat([rows, best.indices + start], dim=1)
            top = torch.topk(torch.cat([scores, best.values], dim=1), min(k, rows.shape[1]), dim=1)
            rows, scores = rows.gather(1, top.indices), top.values
    if scores.shape[1] < k or bool(torch.isneginf(scores[:, -1]).any()):
        raise UserError(f"fewer than {k} items are left for some query of the batch; lower the list's size")
    return rows, scores


def entropy(queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None) -> Tensor:
    """Entropy of the policy in nats, (B,): log Z − E[s]/τ, and E[s] is q's product with the mean item."""
    log_z, mean = moments(queries, items, temperature, excluded)
    return log_z - (queries * mean).sum(dim=1) / temperature


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: must be above 0")
