"""Exact draws from the policy over the whole catalog, in one pass and in memory that does not grow with it.

The pass turns each block of items into weights exp(s/τ) and sums these over small parts of 64 items. Draws
with replacement then race cells of parts against each other by Gumbel noise on their log-masses, and choose
the item only in cells that take the lead. Draws without replacement need the largest perturbed scores; that
of a part is Gumbel around the part's log-mass, so the parts' maxima are drawn first and items get noise of
their own only in parts that can still hold one of the n largest (Kool et al., 2019; Maddison et al., 2014).

All noise is a function of (seed, step, the query's place in the batch, the cell, part or item): the block
size, the other queries and the number of processes change nothing. Sharded over processes, each holds a range
of whole cells (`Shard`); per query n candidates are gathered, items and scores never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from novelret.blocks import BLOCK, Items, block_logits, rows_to_tensor
from novelret.errors import UserError
from novelret.shard import Shard, from_all
from novelret.train.noise import gumbel, uniform
from novelret.train.policy import check_temperature

CELL = 4_096
"""Items that race together for draws with replacement. Blocks and shards are whole cells."""

PART = 64
"""Items whose weights are summed together; cells are whole parts."""

_CELLS, _ITEMS, _MAXIMA, _NOISE, _PARTS = range(5)  # streams of random numbers

_MOST_NOISE = 38.0
"""Bound on Gumbel noise: 53-bit uniform numbers cannot lie closer to 1 than what gives 37.4."""

_TINY = 1e-30
"""Masses below, relative to the shift, have lost digits to underflow."""


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
        perturbed: (B, n) s/τ + Gumbel noise, descending, for draws without replacement; else None.
    """

    rows: Tensor
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
        UserError: τ is not positive, every item is left out for a query, or scores are not finite.
    """
    best = _Best.empty(queries, n)
    sound = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    places = key.places[:, None]
    draws = torch.arange(n, device=queries.device)[None]
    of_part = uniform(key.seed, _PARTS, key.step, places, draws)
    of_item = uniform(key.seed, _ITEMS, key.step, places, draws)
    for part in _scan(queries, items, temperature, excluded, shard, block):
        sound &= torch.isfinite(part.masses).all(dim=1)
        masses = _whole_cells(part.masses).double()
        cells = torch.log(masses.sum(dim=2)) + part.shift
        numbers = part.first // CELL + torch.arange(cells.shape[1], device=queries.device)
        # One number per (draw, cell); catalogs stay below 2^40 cells.
        noise = _noise(key, _CELLS, places[:, :, None], (draws[:, :, None] << 40) + numbers)
        leader = torch.max(cells[:, None, :] + noise, dim=2)
        query, place = (leader.values > best.values).nonzero(as_tuple=True)
        if len(query) == 0:
            continue
        cell = leader.indices[query, place]
        inside = cell * (CELL // PART) + _inverse(masses[query, cell], of_part[query, place])
        item = _inverse(part.weights[query, inside].double(), of_item[query, place])
        best.values[query, place] = leader.values[query, place]
        best.rows[query, place] = part.first + inside * PART + item
    best.spoil(~sound)
    if shard is not None:
        values, rows = from_all(best.values), from_all(best.rows)
        winner = values.argmax(dim=0, keepdim=True)
        best = _Best(values.gather(0, winner)[0], rows.gather(0, winner)[0])
    _check_highest(best.values[:, 0])
    return Draw(best.rows)


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

    Arguments and errors as for `draw_with_replacement`; also an error where a query has fewer than n items.
    """
    best = _Best.empty(queries, n)
    sound = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    within = torch.arange(PART, device=queries.device)
    for part in _scan(queries, items, temperature, excluded, shard, block):
        sound &= torch.isfinite(part.masses).all(dim=1)
        masses = part.masses.double()
        numbers = part.first // PART + torch.arange(masses.shape[1], device=queries.device)
        noise = _noise(key, _MAXIMA, key.places[:, None], numbers)
        maxima = torch.log(masses.masked_fill(masses < _TINY, 0.0)) + part.shift + noise
        # Each part's maximum is some item's, so n items reach the n-th of them.
        least = best.values[:, -1:]
        if masses.shape[1] >= n and bool(torch.isneginf(least).any()):
            least = torch.maximum(least, torch.topk(maxima, n, dim=1).values[:, -1:])
        _restore_tiny(maxima, masses, noise, part, least)
        query, opened = ((maxima >= least) & ~torch.isneginf(maxima)).nonzero(as_tuple=True)
        if len(query) == 0:
            continue
        logits = part.logits[query, opened].double() + part.shift[query]
        rows = part.first + opened[:, None] * PART + within[: logits.shape[1]]
        free = logits + _noise(key, _NOISE, key.places[query][:, None], rows)
        perturbed = _condition(free, maxima[query, opened][:, None])
        found, column = ((perturbed >= least[query]) & ~torch.isneginf(perturbed)).nonzero(as_tuple=True)
        best = best.merged(query[found], _Best(perturbed[found, column], rows[found, column]))
    best.spoil(~sound)
    if shard is not None:
        everyone = (from_all(x).movedim(0, 1).flatten(1) for x in (best.values, best.rows))
        best = _Best(*everyone).largest(n)
    _check_highest(best.values[:, 0])
    short = torch.isneginf(best.values[:, -1])
    if bool(short.any()):
        raise UserError(
            f"query {int(short.nonzero()[0])} of the batch: fewer than {n} items are left to draw"
        )
    return Draw(best.rows, best.values.to(queries.dtype))


def draw_from_top(top_rows: Tensor, top_scores: Tensor, n: int, key: Key, temperature: float) -> Draw:
    """Approximate mode: draws with replacement restricted to each query's top P items.

    Args:
        top_rows: (B, P) catalog rows, for instance from the deployed index; −1 padded.
        top_scores: (B, P) their scores under the current policy.
        n: draws per query.
        key: what decides the draws.
        temperature: τ.

    Returns:
        The draw.

    Raises:
        UserError: τ is not positive, a query has no item, or scores are not finite.
    """
    check_temperature(temperature)
    logits = (top_scores.double() / temperature).masked_fill(top_rows < 0, -torch.inf)
    _check_highest(logits.amax(dim=1))
    draws = torch.arange(n, device=top_rows.device)[None]
    numbers = uniform(key.seed, _ITEMS, key.step, key.places[:, None], draws)
    chosen = _inverse(torch.softmax(logits, dim=1), numbers)
    return Draw(top_rows.gather(1, chosen))


@dataclass(frozen=True)
class _Best:
    """Candidates held so far: perturbed scores and catalog rows, of one shape."""

    values: Tensor
    rows: Tensor

    @staticmethod
    def empty(queries: Tensor, n: int) -> _Best:
        values = torch.full((len(queries), n), -torch.inf, dtype=torch.float64, device=queries.device)
        return _Best(values, torch.full_like(values, -1, dtype=torch.int64))

    def spoil(self, queries: Tensor) -> None:
        """Mark (B,) bool queries whose scores are not finite: NaN counts over what other processes found."""
        self.values.masked_fill_(queries[:, None], torch.nan)

    def largest(self, n: int) -> _Best:
        top = torch.topk(self.values, n, dim=1)
        return _Best(top.values, self.rows.gather(1, top.indices))

    def merged(self, query: Tensor, found: _Best) -> _Best:
        """The n largest of these and of flat candidates, `query` telling whose each is, in rising order."""
        counts = torch.bincount(query, minlength=len(self.values))
        first = counts.cumsum(0) - counts
        column = torch.arange(len(query), device=query.device) - first[query]
        width = int(counts.max())
        n = self.values.shape[1]
        wide = _Best(
            *(
                pad(x, (0, width), value=-torch.inf if x.is_floating_point() else -1)
                for x in (self.values, self.rows)
            )
        )
        wide.values[query, n + column] = found.values
        wide.rows[query, n + column] = found.rows
        return wide.largest(n)


@dataclass(frozen=True)
class _Block:
    """Some items of the pass, in parts; buffers are used again for the next.

    Attributes:
        first: catalog row of the first item.
        shift: (B, 1) float64, what was taken from the logits so that weights neither overflow nor vanish.
        logits: (B, parts, PART) s/τ less the shift; −inf for excluded items and padding.
        weights: (B, parts, PART) their exponentials.
        masses: (B, parts) sums of weights.
    """

    first: int
    shift: Tensor
    logits: Tensor
    weights: Tensor
    masses: Tensor


@torch.no_grad()
def _scan(
    queries: Tensor,
    items: Items,
    temperature: float,
    excluded: Tensor | None,
    shard: Shard | None,
    block: int,
) -> Iterator[_Block]:
    """Stream over the items held here."""
    check_temperature(temperature)
    first = 0 if shard is None else shard.first
    if first % CELL:
        raise ValueError(f"a shard begins at row {first}, which is no multiple of {CELL}")
    if queries.dtype in (torch.float16, torch.bfloat16):
        queries = queries.float()
    width = max(1, min(PART, len(items)))  # a catalog below one part is not padded to it
    block = min(-(-block // CELL) * CELL, max(1, -(-len(items) // width) * width))
    logits, weights = (queries.new_empty(len(queries) * block) for _ in range(2))
    shift = torch.zeros((len(queries), 1), dtype=torch.float64, device=queries.device)
    is_shifted = False
    seen = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for start in range(0, len(items), block):
        part = rows_to_tensor(items[start : start + block], queries)
        padded = -(-len(part) // width) * width
        shape = (len(queries), padded)
        of_block = logits[: len(queries) * padded].view(shape)
        block_logits(queries, part, first + start, temperature, excluded, out=of_block[:, : len(part)])
        of_block[:, len(part) :] = -torch.inf
        if is_shifted:
            of_block -= shift
        exponentials = weights[: len(queries) * padded].view(len(queries), padded // width, width)
        in_parts = of_block.view_as(exponentials)
        masses = torch.exp(in_parts, out=exponentials).sum(dim=2)
        largest = masses.amax(dim=1)
        # What a query's weights are measured against is set where it first matters, and raised if need be.
        off = (largest > 1e30) | (~seen & (largest < 1e-9))
        if bool(off.any()):
            highest = of_block.amax(dim=1, keepdim=True)
            change = torch.where(off[:, None] & torch.isfinite(highest), highest, 0.0)
            of_block -= change
            shift += change
            is_shifted = True
            masses = torch.exp(in_parts, out=exponentials).sum(dim=2)
        seen |= masses.amax(dim=1) > 0
        yield _Block(first + start, shift, in_parts, exponentials, masses)


def _restore_tiny(maxima: Tensor, masses: Tensor, noise: Tensor, part: _Block, least: Tensor) -> None:
    """Draw, from the logits themselves, the maxima of parts whose mass underflowed but which could matter."""
    reach = part.shift + torch.log(torch.tensor(_TINY, dtype=torch.float64)) + _MOST_NOISE
    query, tiny = ((masses < _TINY) & (least < reach)).nonzero(as_tuple=True)
    if len(query):
        exact = torch.logsumexp(part.logits[query, tiny].double(), dim=1) + part.shift[query, 0]
        maxima[query, tiny] = exact + noise[query, tiny]


def _whole_cells(masses: Tensor) -> Tensor:
    """(B, cells, parts of a cell) masses, the last cell padded with empty parts."""
    size = CELL // PART
    return pad(masses, (0, -masses.shape[1] % size)).unflatten(1, (-1, size))


def _noise(key: Key, stream: int, places: Tensor, numbers: Tensor) -> Tensor:
    """Gumbel noise, bounded by `_MOST_NOISE` also where a uniform number was rounded to 1."""
    return gumbel(key.seed, stream, key.step, places, numbers).clamp(max=_MOST_NOISE)


def _condition(free: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel-perturbed scores, shifted to have the given maximum, with the right joint distribution."""
    highest = free.amax(dim=1, keepdim=True)
    gap = torch.log1p(-torch.exp(free - highest))  # −inf for the largest itself, which lands on the maximum
    v = maximum - free + gap
    shifted = maximum - torch.relu(v) - torch.log1p(torch.exp(-v.abs()))
    shifted = torch.where(free == highest, maximum.expand_as(free), shifted)
    return shifted.masked_fill(torch.isneginf(free), -torch.inf)


def _inverse(masses: Tensor, numbers: Tensor) -> Tensor:
    """Columns of (R, m) masses in which uniform numbers, (R,) or (R, n), fall; never one of mass 0."""
    cumulated = torch.cumsum(masses, dim=1)
    wanted = (numbers if numbers.dim() == 2 else numbers[:, None]) * cumulated[:, -1:]
    positions = torch.searchsorted(cumulated, wanted, right=True)
    # Rounding may put a number on the last sum itself, beyond the last column that has mass.
    last = masses.shape[1] - 1 - torch.argmax((masses > 0).flip(1).to(torch.int8), dim=1)
    return torch.minimum(positions, last[:, None]).view_as(numbers)


def _check_highest(values: Tensor) -> None:
    """Refuse queries of which nothing, or no number, is the highest of all values."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        query = int(bad.nonzero()[0])
        what = "every item is left out" if bool(torch.isneginf(values[query])) else "scores are not finite"
        raise UserError(f"query {query} of the batch: {what}")
