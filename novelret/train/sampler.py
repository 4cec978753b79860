"""Exact draws from the policy over the whole catalog, in memory that does not grow with it.

One pass gives each cell of items its log-mass; only the cells that can matter are looked at again. Both
kinds of draw start from there, and both are functions of (seed, step, the query's place in the batch): the
block size, the other queries and the number of processes change nothing.

Sharded over processes, each holds a range of whole cells (`Shard`); masses and the few drawn items are
gathered, items and scores never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from novelret.errors import UserError
from novelret.train.noise import gumbel, uniform
from novelret.train.policy import BLOCK, CELL, Items, block_logits, item_blocks, rows_to_tensor

_CELLS, _ITEMS, _MAXIMA, _NOISE = range(4)  # streams of random numbers


@dataclass(frozen=True)
class Shard:
    """Which items this process holds.

    Attributes:
        first: catalog row of its first item, a multiple of CELL.
        total: items in the whole catalog.
        group: the processes that hold the rest; None for the default group.
    """

    first: int
    total: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Key:
    """What a batch's draws are a function of.

    Attributes:
        seed: the run's seed.
        step: the optimizer step.
        places: (B,) int64, each query's place in the whole batch.
    """

    seed: int
    step: int
    places: Tensor


@dataclass(frozen=True)
class Draw:
    """Items drawn for each query.

    Attributes:
        rows: (B, n) int64 catalog rows; in the order drawn.
        log_probability: (B, n) exact log π(z | q) of each.
        log_partition: (B,) exact log Z(q).
        perturbed: (B, n) s/τ + Gumbel noise, descending, for draws without replacement; else None.
    """

    rows: Tensor
    log_probability: Tensor
    log_partition: Tensor
    perturbed: Tensor | None = None


def draw_with_replacement(
    queries: Tensor,
    items: Items,
    n: int,
    key: Key,
    temperature: float,
    excluded: Tensor | None = None,
    *,
    shard: Shard | None = None,
    block: int = BLOCK,
) -> Draw:
    """Independent draws from softmax(s/τ): first the cell by its mass, then the item inside it.

    Args:
        queries: (B, d) embeddings, all processes the same.
        items: (N, d) embeddings, or this process's part of them.
        n: draws per query.
        key: what decides the draws.
        temperature: τ of the sampling policy.
        excluded: (B, E) int64 catalog rows never drawn, −1 padded.
        shard: this process's part of a sharded catalog.
        block: items per block of the pass.

    Raises:
        UserError: τ is not positive or every item is left out for a query.
    """
    masses = cell_log_masses(queries, items, temperature, excluded, shard=shard, block=block)
    log_z = torch.logsumexp(masses, dim=1)
    places, draws = key.places[:, None], torch.arange(n, device=queries.device)[None]
    cells = _inverse(torch.softmax(masses, dim=1), uniform(key.seed, _CELLS, key.step, places, draws))
    numbers = uniform(key.seed, _ITEMS, key.step, places, draws)
    rows = torch.full_like(cells, -1)
    logits = torch.full(cells.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    for start, of_cell, query, place in _opened(cells, items, queries, temperature, excluded, shard):
        inside = _inverse(torch.softmax(of_cell, dim=1), numbers[query, place][:, None])
        rows[query, place] = start + inside[:, 0]
        logits[query, place] = of_cell.gather(1, inside)[:, 0]
    if shard is not None:
        # Each draw was made by exactly one process; the others hold −1 and −inf.
        dist.all_reduce(rows, dist.ReduceOp.MAX, shard.group)
        dist.all_reduce(logits, dist.ReduceOp.MAX, shard.group)
    log_probability = (logits - log_z[:, None]).to(queries.dtype)
    return Draw(rows, log_probability, log_z.to(queries.dtype))


def draw_without_replacement(
    queries: Tensor,
    items: Items,
    n: int,
    key: Key,
    temperature: float,
    excluded: Tensor | None = None,
    *,
    shard: Shard | None = None,
    block: int = BLOCK,
) -> Draw:
    """The n items with the largest s/τ + Gumbel noise: an ordered Plackett-Luce draw (Gumbel-top-n).

    Noise on every item would cost more than the scores. Instead the largest perturbed score of each cell is
    drawn from its log-mass, as that is Gumbel around it; only the n cells with the largest maxima can hold
    one of the top n items, and their items' noise is drawn given the cell's maximum (Kool et al., 2019).

    Arguments and errors as for `draw_with_replacement`; also an error where a query has fewer than n items.
    """
    masses = cell_log_masses(queries, items, temperature, excluded, shard=shard, block=block)
    log_z = torch.logsumexp(masses, dim=1)
    n_cells = masses.shape[1]
    places = key.places[:, None]
    numbers = torch.arange(n_cells, device=queries.device)[None]
    maxima = masses + gumbel(key.seed, _MAXIMA, key.step, places, numbers)
    opened = torch.topk(maxima, min(n, n_cells), dim=1)
    best = torch.full((len(queries), n), -torch.inf, dtype=torch.float64, device=queries.device)
    best_rows = torch.full((len(queries), n), -1, dtype=torch.int64, device=queries.device)
    best_logits = best.clone()
    for start, logits, query, place in _opened(opened.indices, items, queries, temperature, excluded, shard):
        rows = torch.arange(start, start + logits.shape[1], device=queries.device)[None]
        free = logits + gumbel(key.seed, _NOISE, key.step, key.places[query][:, None], rows)
        perturbed = _condition(free, opened.values[query, place][:, None])
        values = torch.cat([best[query], perturbed], dim=1)
        top = torch.topk(values, n, dim=1)
        best[query] = top.values
        best_rows[query] = torch.cat([best_rows[query], rows.expand(len(query), -1)], 1).gather(
            1, top.indices
        )
        best_logits[query] = torch.cat([best_logits[query], logits], dim=1).gather(1, top.indices)
    if shard is not None:
        best, best_rows, best_logits = _merge(best, best_rows, best_logits, n, shard)
    short = torch.isneginf(best[:, -1])
    if bool(short.any()):
        raise UserError(
            f"query {int(short.nonzero()[0])} of the batch: fewer than {n} items are left to draw"
        )
    dtype = queries.dtype
    return Draw(best_rows, (best_logits - log_z[:, None]).to(dtype), log_z.to(dtype), best.to(dtype))


def cell_log_masses(
    queries: Tensor,
    items: Items,
    temperature: float,
    excluded: Tensor | None = None,
    *,
    shard: Shard | None = None,
    block: int = BLOCK,
) -> Tensor:
    """(B, cells of the whole catalog) log Σ exp(s/τ) of each cell, float64.

    Raises:
        UserError: τ is not positive or every item is left out for a query.
    """
    if not temperature > 0:
        raise UserError(f"sampling temperature {temperature}: must be above 0")
    first = 0 if shard is None else shard.first
    block = -(-block // CELL) * CELL  # whole cells
    # Made in one piece: small results kept between the large blocks would pin those in the heap.
    masses = torch.empty((len(queries), -(-len(items) // CELL)), dtype=torch.float64, device=queries.device)
    with torch.no_grad():
        for start, part in item_blocks(items, queries, block):
            logits = block_logits(queries, part, first + start, temperature, excluded)
            for cell, of_cell in enumerate(logits.split(CELL, dim=1), start // CELL):
                masses[:, cell] = torch.logsumexp(of_cell, dim=1)
    if shard is not None:
        masses = _gather_columns(masses, shard)
    empty = torch.isneginf(masses).all(dim=1)
    if bool(empty.any()):
        raise UserError(f"query {int(empty.nonzero()[0])} of the batch: every item is left out")
    return masses


def draw_from_top(
    top_rows: Tensor,
    top_scores: Tensor,
    n: int,
    key: Key,
    temperature: float,
    log_partition: Tensor | None = None,
) -> tuple[Draw, Tensor]:
    """Approximate mode: draws with replacement restricted to each query's top P items.

    Args:
        top_rows: (B, P) catalog rows, for instance from the deployed index; −1 padded.
        top_scores: (B, P) their scores under the current policy.
        n: draws per query.
        key: what decides the draws.
        temperature: τ.
        log_partition: (B,) exact log Z over the whole catalog, where it is known.

    Returns:
        The draw, with probabilities within the support, and (B,) the share of the whole policy's mass that
        the support covers; NaN where `log_partition` is not given.
    """
    logits = (top_scores.double() / temperature).masked_fill(top_rows < 0, -torch.inf)
    log_z = torch.logsumexp(logits, dim=1)
    draws = torch.arange(n, device=top_rows.device)[None]
    chosen = _inverse(
        torch.softmax(logits, dim=1), uniform(key.seed, _CELLS, key.step, key.places[:, None], draws)
    )
    log_probability = (logits.gather(1, chosen) - log_z[:, None]).to(top_scores.dtype)
    draw = Draw(top_rows.gather(1, chosen), log_probability, log_z.to(top_scores.dtype))
    if log_partition is None:
        return draw, torch.full_like(draw.log_partition, torch.nan)
    return draw, torch.exp(log_z - log_partition.double()).clamp(max=1.0)


def _opened(
    cells: Tensor,
    items: Items,
    queries: Tensor,
    temperature: float,
    excluded: Tensor | None,
    shard: Shard | None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each distinct cell held here: (first row, float64 logits, query and column that asked for it)."""
    first = 0 if shard is None else shard.first
    for cell in cells.unique().tolist():
        start = cell * CELL
        if not 0 <= start - first < len(items):
            continue
        query, place = (cells == cell).nonzero(as_tuple=True)
        part = rows_to_tensor(items[start - first : start - first + CELL], queries)
        left_out = None if excluded is None else excluded[query]
        yield start, block_logits(queries[query], part, start, temperature, left_out).double(), query, place


def _condition(free: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel-perturbed scores, shifted to have the given maximum, with the right joint distribution."""
    highest = free.amax(dim=1, keepdim=True)
    gap = torch.log1p(-torch.exp(free - highest))  # −inf for the largest itself, which lands on the maximum
    v = maximum - free + gap
    shifted = maximum - torch.relu(v) - torch.log1p(torch.exp(-v.abs()))
    shifted = torch.where(free == highest, maximum.expand_as(free), shifted)
    return shifted.masked_fill(torch.isneginf(free), -torch.inf)


def _inverse(probability: Tensor, numbers: Tensor) -> Tensor:
    """Where uniform numbers fall in the cumulated probabilities, (B, n) columns; never on a 0."""
    cumulated = torch.cumsum(probability, dim=1)
    # The last sum may fall short of 1 by rounding; scaling keeps every number inside.
    positions = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
    last = probability.shape[1] - 1 - torch.argmax((probability > 0).flip(1).to(torch.int8), dim=1)
    return torch.minimum(positions, last[:, None])


def _gather_columns(local: Tensor, shard: Shard) -> Tensor:
    """Columns of all processes side by side, in catalog order."""
    size = dist.get_world_size(shard.group)
    widths = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(size)]
    dist.all_gather(widths, torch.tensor([local.shape[1]], device=local.device), shard.group)
    widest = int(max(widths))
    padded = local.new_full((len(local), widest), -torch.inf)
    padded[:, : local.shape[1]] = local
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, shard.group)
    return torch.cat([part[:, : int(width)] for part, width in zip(parts, widths, strict=True)], dim=1)


def _merge(best: Tensor, rows: Tensor, logits: Tensor, n: int, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest perturbed scores of all processes' own n largest."""
    gathered = []
    for local in (best, rows, logits):
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, local.contiguous(), shard.group)
        gathered.append(torch.cat(parts, dim=1))
    top = torch.topk(gathered[0], n, dim=1)
    return top.values, gathered[1].gather(1, top.indices), gathered[2].gather(1, top.indices)
