"""Exact draws from the policy over the whole catalog, in memory that does not grow with it.

Draws are keyed by numbers that the caller gives, one row per query, so a query's draws depend neither on
the block size nor on which other queries or processes there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from novelret.train.policy import CELL, Items, block_logits, item_blocks, rows_to_tensor


@dataclass(frozen=True)
class Draw:
    """Items drawn for each query.

    Attributes:
        rows: (B, n) int64 catalog rows.
        log_probability: (B, n) exact log π(z | q) of each.
        log_partition: (B,) exact log Z(q).
    """

    rows: Tensor
    log_probability: Tensor
    log_partition: Tensor


def uniform_numbers(seed: int, step: int, queries: np.ndarray, n: int) -> np.ndarray:
    """(B, n) numbers in [0, 1) for the batch's places `queries`, a function of (seed, step, place) alone."""
    most = int(queries.max()) + 1 if len(queries) else 0
    return np.random.default_rng((seed % (1 << 32), step, 0xD4A3)).random((most, n))[queries]


def draw_with_replacement(
    queries: Tensor,
    items: Items,
    numbers: np.ndarray,
    temperature: float,
    excluded: Tensor | None = None,
    blocks_of: int = 4,
) -> Draw:
    """Independent draws from softmax(s/τ): first the cell by its mass, then the item inside it.

    Only the cells' masses are kept, B × N / 4096 numbers, so one pass over the catalog finds the cells and
    only the cells that were drawn are looked at again.

    Args:
        queries: (B, d) embeddings.
        items: (N, d) embeddings.
        numbers: (B, 2n) uniform in [0, 1): n to choose cells, n to choose items.
        temperature: τ of the sampling policy.
        excluded: (B, E) int64 rows never drawn, −1 padded.
        blocks_of: cells per block.

    Raises:
        UserError: τ is not positive or every item is left out for a query.
    """
    count = numbers.shape[1] // 2
    chosen = torch.from_numpy(numbers).to(queries.device, torch.float64)
    masses = cell_log_masses(queries, items, temperature, excluded, blocks_of)
    log_z = torch.logsumexp(masses.double(), dim=1)
    cells = _inverse(torch.softmax(masses.double(), dim=1), chosen[:, :count])
    rows = torch.empty_like(cells)
    log_probability = queries.new_empty(cells.shape)
    for cell in cells.unique().tolist():
        query, place = (cells == cell).nonzero(as_tuple=True)
        start = cell * CELL
        part = rows_to_tensor(items[start : start + CELL], queries)
        left_out = None if excluded is None else excluded[query]
        logits = block_logits(queries[query], part, start, temperature, left_out).double()
        inside = _inverse(torch.softmax(logits, dim=1), chosen[query, count + place][:, None])
        rows[query, place] = start + inside[:, 0]
        log_probability[query, place] = (logits.gather(1, inside)[:, 0] - log_z[query]).to(queries.dtype)
    return Draw(rows, log_probability, log_z.to(queries.dtype))


def cell_log_masses(
    queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None, blocks_of: int = 4
) -> Tensor:
    """(B, N / 4096) log Σ exp(s/τ) of each cell of items.

    Raises:
        UserError: τ is not positive or every item is left out for a query.
    """
    from novelret.errors import UserError

    if not temperature > 0:
        raise UserError(f"sampling temperature {temperature}: must be above 0")
    parts = []
    with torch.no_grad():
        for start, block in item_blocks(items, queries, blocks_of * CELL):
            logits = block_logits(queries, block, start, temperature, excluded)
            parts += [torch.logsumexp(cell, dim=1) for cell in logits.split(CELL, dim=1)]
    masses = torch.stack(parts, dim=1)
    empty = torch.isneginf(masses).all(dim=1)
    if bool(empty.any()):
        raise UserError(f"query {int(empty.nonzero()[0])} of the batch: every item is left out")
    return masses


def _inverse(probability: Tensor, numbers: Tensor) -> Tensor:
    """Where uniform numbers fall in the cumulated probabilities, (B, n) columns; never on a 0."""
    cumulated = torch.cumsum(probability, dim=1)
    # The last sum may fall short of 1 by rounding; scaling keeps every number inside.
    positions = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
    last = probability.shape[1] - 1 - torch.argmax((probability > 0).flip(1).to(torch.int8), dim=1)
    return torch.minimum(positions, last[:, None])
