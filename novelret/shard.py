"""Which share of the catalog a process holds, where several train together (`torchrun`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A range of the catalog's rows.

    Attributes:
        first: catalog row of its first item, a multiple of the sampler's CELL.
    """

    first: int


def from_all(local: Tensor) -> Tensor:
    """Tensors of one shape from all processes, stacked in a new first dimension."""
    parts = [torch.empty_like(local).contiguous() for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts)
