"""Several processes that train together, as `torchrun` starts them; one process is the plain case of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from novelret.errors import UserError

_START = timedelta(minutes=10)
# The others wait while the first encodes and searches, or a judge answers: hours, with a large catalog.
_LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: this process's number; 0 writes everything that is written.
        size: how many there are.
        device: this process's device.
    """

    rank: int
    size: int
    device: str

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, count: int) -> np.ndarray:
        """Which of `count` things are this process's; int64, strided so that every kind is spread evenly."""
        return np.arange(self.rank, count, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give each parameter the sum of all processes' gradients; one message for all of them.

        What no process has a gradient for stays without, as with one process.
        """
        if self.size == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        known = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        flat = self.sum(torch.cat([known, *(part.flatten() for part in parts)]))
        known, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, total, is_known in zip(parameters, sums, known.tolist(), strict=True):
            parameter.grad = total.view_as(parameter) if is_known else None

    def concatenate(self, array: np.ndarray) -> np.ndarray:
        """Float arrays of all processes, one after the other along the first dimension."""
        if self.size == 1:
            return array
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(array)
        most = int(self.sum(counts).max())
        padded = torch.zeros((most, *array.shape[1:]), dtype=torch.float64, device=self.device)
        padded[: len(array)] = torch.from_numpy(array).to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        kept = [part[: int(n)].cpu().numpy() for part, n in zip(parts, counts, strict=True)]
        return np.concatenate(kept).astype(array.dtype)

    def from_first(self, array: np.ndarray) -> np.ndarray:
        """The first process's array; the others give one of the same shape and dtype."""
        if self.size == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        dist.broadcast(tensor, 0)
        return tensor.cpu().numpy()


def _meet(rank: int, size: int) -> dist.Store:
    """Where processes find each other; without this, those whose `torchrun` is gone would wait for days."""
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_START))
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"torchrun at {where} did not answer in {_START} ({str(error).splitlines()[0]}); start it again"
        ) from None
    return cast(dist.Store, store)


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started; without it, be the only one.

    Args:
        device: "cpu" or "cuda"; on GPUs each process takes the one of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # whose memory is told
        yield Processes(0, 1, device)
        return
    rank = int(os.environ["RANK"])
    if device.startswith("cuda"):
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"torchrun --nproc-per-node {here}: this machine has {gpus} GPUs; start as many")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device != "cpu" else "gloo"
    store = _meet(rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    # NCCL connects at the first message, by the store's own timeout: others wait there for what one builds.
    store.set_timeout(_LONGEST_WAIT)
    yield Processes(rank, size, device)
    dist.destroy_process_group()
