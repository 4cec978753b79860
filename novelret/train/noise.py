"""Random numbers as a function of where they are used, so that draws depend on nothing else.

A counter-based generator (SplitMix64's finaliser over a keyed counter): the number for (seed, step, query
place, item row) is the same whatever the block size, the batch's company or the number of processes, and
only the numbers that are needed are ever made.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def uniform(seed: int, stream: int, step: int, places: Tensor, rows: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, in the broadcast shape of `places` and `rows` (int64)."""
    bits = _mix(_mix((places + 1) * _GOLDEN ^ _key(seed, stream, step)) + (rows + 1) * _GOLDEN)
    # 53 bits, centred: never 0 and never 1.
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def gumbel(seed: int, stream: int, step: int, places: Tensor, rows: Tensor) -> Tensor:
    """Standard Gumbel numbers, float64."""
    return -torch.log(-torch.log(uniform(seed, stream, step, places, rows)))


@lru_cache(maxsize=64)
def _key(seed: int, stream: int, step: int) -> int:
    """A signed 64-bit integer, kept, since each block of a pass over a catalog asks for it."""
    return int(_mix(_mix(_mix(torch.tensor(seed % (1 << 62)) + _GOLDEN) ^ stream) ^ step))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
