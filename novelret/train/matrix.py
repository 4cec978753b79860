"""The frozen item matrix as training uses it: whole, or shared between processes (`torchrun`).

Everything that passes over all items (draws, log-partitions, top lists) passes over the share this process
holds; the queries of all processes are gathered first and the results put together, so each process gets for
its own queries what it would get alone. Single rows are read from the whole memory-mapped matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from novelret.blocks import BLOCK, Items, top_k
from novelret.progress import Reporter
from novelret.shard import Shard, from_all
from novelret.train import policy, sampler
from novelret.train.sampler import Draw, Key


@dataclass(frozen=True)
class ItemMatrix:
    """(N, d) item embeddings.

    Attributes:
        whole: every row, where single rows are read from.
        held: the rows that this process passes over.
        shard: which rows these are, where processes share the catalog; None where `held` is all.
    """

    whole: Items
    held: Items
    shard: Shard | None = None

    def __len__(self) -> int:
        return len(self.whole)

    def rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Embeddings of any shape of catalog rows, in the dtype and on the device of `like`."""
        if isinstance(self.whole, Tensor):
            return self.whole[rows.to(self.whole.device)].to(like.device, like.dtype)
        found = np.asarray(self.whole[rows.cpu().numpy()], dtype=np.float32)
        return torch.from_numpy(found).to(like.device, like.dtype)

    def draw(
        self, queries: Tensor, n: int, key: Key, temperature: float, excluded: Tensor, *, replacement: bool
    ) -> Draw:
        """Draw n items for each of this process's queries (see `sampler`); all processes have to call it."""
        draw = sampler.draw_with_replacement if replacement else sampler.draw_without_replacement
        asked = self._gather(queries.detach(), excluded, key.places)
        key = replace(key, places=asked.places)
        drawn = draw(
            asked.queries,
            self.held,
            n,
            key,
            temperature,
            asked.excluded,
            shard=self.shard,
            block=_block(queries),
        )
        perturbed = None if drawn.perturbed is None else drawn.perturbed[asked.mine]
        return Draw(drawn.rows[asked.mine], perturbed)

    def log_partition(self, queries: Tensor, temperature: float, excluded: Tensor) -> Tensor:
        """Log Z of this process's queries, (b,), with gradient; all processes have to call it."""
        log_z, mean = self._moments(queries, temperature, excluded)
        return policy.with_slope(queries, log_z, mean, temperature)

    def entropy(self, queries: Tensor, temperature: float, excluded: Tensor) -> Tensor:
        """Entropy of the policy in nats, (b,); all processes have to call it."""
        log_z, mean = self._moments(queries, temperature, excluded)
        return policy.entropy_of(queries.detach(), log_z, mean, temperature)

    def top_k(self, queries: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k) catalog rows with the highest scores, and these; all processes have to call it."""
        asked = self._gather(queries.detach(), excluded)
        rows, scores = top_k(
            asked.queries, self.held, k, asked.excluded, block=_block(queries), shard=self.shard
        )
        return rows[asked.mine], scores[asked.mine]

    def _moments(self, queries: Tensor, temperature: float, excluded: Tensor) -> tuple[Tensor, Tensor]:
        asked = self._gather(queries.detach(), excluded)
        log_z, mean = policy.moments(
            asked.queries, self.held, temperature, asked.excluded, block=_block(queries), shard=self.shard
        )
        return log_z[asked.mine], mean[asked.mine]

    def _gather(self, queries: Tensor, excluded: Tensor, places: Tensor | None = None) -> _Asked:
        if places is None:
            places = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        if self.shard is None:
            return _Asked(queries, excluded, places, slice(None))
        shape = torch.tensor(excluded.shape, device=queries.device)
        dist.all_reduce(shape, dist.ReduceOp.MAX)
        most, widest = shape.tolist()
        short = most - len(queries)
        # Padding queries are 0: any draw will do for them, as nobody looks at it.
        padded = (
            pad(queries, (0, 0, 0, short)),
            pad(excluded, (0, widest - excluded.shape[1], 0, short), value=-1),
            pad(places, (0, short)),
        )
        first = dist.get_rank() * most
        asked, left_out, at = (from_all(part).flatten(0, 1) for part in padded)
        return _Asked(asked, left_out, at, slice(first, first + len(queries)))


def _block(queries: Tensor) -> int:
    """Items at a time: on a GPU more, since each block costs it a hundred calls or two, whatever its size."""
    return BLOCK * (4 if queries.is_cuda else 1)


@dataclass(frozen=True)
class _Asked:
    """Queries of all processes; `mine` are this one's."""

    queries: Tensor
    excluded: Tensor
    places: Tensor
    mine: slice


def open_matrix(embeddings: np.ndarray, device: str, report: Reporter | None = None) -> ItemMatrix:
    """Hold the item matrix, or this process's share of it, on the device.

    Args:
        embeddings: (N, d) float32 or float16, memory-mapped. On the CPU, and where a GPU is too small for it,
            it stays so.
        device: "cpu" or a CUDA device.
        report: for the warning that a GPU is too small.
    """
    report = report or Reporter()
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        held = _on_device(embeddings, device, report)
        return ItemMatrix(held, held)
    cells = -(-len(embeddings) // sampler.CELL)
    first, last = (
        min(len(embeddings), cells * rank // size * sampler.CELL)
        for rank in (dist.get_rank(), dist.get_rank() + 1)
    )
    held = _on_device(embeddings[first:last], device, report)
    return ItemMatrix(embeddings, held, Shard(first))


def _on_device(embeddings: np.ndarray, device: str, report: Reporter) -> Items:
    if device == "cpu":
        return embeddings
    dtype = torch.float16 if embeddings.dtype == np.float16 else torch.float32
    try:
        matrix = torch.empty(embeddings.shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        report.warn(
            f"{device}: too small for the item matrix ({embeddings.nbytes / 2**30:.1f} GiB), which is "
            "read from the disk block by block instead, and that is slow. `novelret index --dtype float16` "
            "halves it, torchrun spreads it over several GPUs"
        )
        return embeddings
    for start in range(0, len(embeddings), BLOCK):  # never twice in the machine's memory
        part = np.array(embeddings[start : start + BLOCK])
        matrix[start : start + len(part)] = torch.from_numpy(part)
    return matrix
