"""The item matrix, block by block: memory does not grow with the catalog.

Items come as a (N, d) numpy array, memory-mapped or not, or as a tensor that may live on a GPU; float32,
float16 or bfloat16. Blocks are turned into the queries' dtype one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from novelret.errors import UserError
from novelret.shard import Shard, from_all

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
    return wrapped.to(like.device).to(like.dtype)  # in this order half of the bytes go to a GPU


def read_rows(items: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Embeddings of item rows of any shape, float32, read in ascending order of a memory map, each once."""
    unique, place = np.unique(rows, return_inverse=True)
    read: np.ndarray = np.asarray(items[unique], dtype=np.float32)[place.reshape(rows.shape)]
    return read


def block_logits(
    queries: Tensor,
    block: Tensor,
    start: int,
    temperature: float,
    excluded: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """(B, n) logits s/τ of one block, −inf for `excluded` (B, E) catalog rows; in `out` where it is given."""
    logits = torch.mm(queries / temperature, block.T, out=out)
    if excluded is not None:
        inside = (excluded >= start) & (excluded < start + len(block))
        least = torch.where(inside, -torch.inf, torch.inf).to(logits.dtype)
        # Without asking how many are inside, for which a GPU would have to be waited for at every block.
        logits.scatter_reduce_(1, (excluded - start).clamp(0, len(block) - 1), least, "amin")
    return logits


def top_k(
    queries: Tensor,
    items: Items,
    k: int,
    excluded: Tensor | None = None,
    block: int = BLOCK,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items with the highest scores, as (B, k) rows and scores, no gradient.

    Sharded as in `train.policy.moments`.

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
            rows, scores = (from_all(x).movedim(0, 1).flatten(1) for x in (rows, scores))
            top = torch.topk(scores, k, dim=1)
            rows, scores = rows.gather(1, top.indices), top.values
    if scores.shape[1] < k or bool(torch.isneginf(scores[:, -1]).any()):
        raise UserError(f"fewer than {k} items are left for some query of the batch; lower the list's size")
    return rows, scores


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
