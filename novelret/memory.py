"""A memory of what is relevant to training queries, which moves a query towards what is relevant to its like.

    m(x) = x + s · Σ_j a_j v_j,   a = softmax_j((x + x M) · k_j / (t · l))

Keys k_j are deployed embeddings, of unit length, of training queries and of items known to be relevant to
them; l is the length that queries have on average, 1 where they are normalised. Values v_j start at the mean
embedding of what goes with the key: for a query the items known to be relevant to it, for one of these the
others, as what goes with an item near a query is likely to suit the query, and the query itself where that is
an item, too, and relevance goes both ways. They are trained, as are the metric M, by which a query finds what
is like it to this end, and the scale s. Both start at 0: the deployed encoder.

It is served by two of sentence-transformers' own Dense modules, so the result loads anywhere: the first
turns x into (a, x), d dimensions wider than there are keys, the second adds the values up. The metric goes
into the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Dense

TEMPERATURE = 0.06
_SCALE = 10.0  # s = 10 · `scale`, so that one learning rate does for a residual map, values and scale
_SAME = 1 - 1e-4  # cosine from which on two queries are the same one; encoders in bfloat16 differ by 3e-5
_NEVER = -1e4  # a logit whose share is 0, in float16 too


class Memory(nn.Module):
    """What is trained.

    Attributes:
        temperature: t · l, what products of queries and keys are divided by.
        keys: (n, d) buffer, of unit length.
        sources: (n,) int64 buffer, the place of the query that each key comes from, for a query its own.
        queries: how many keys are queries'; they stand in front.
        values: (n, d) parameter.
        metric: (d, d) parameter, M.
        scale: () parameter, a tenth of s.
    """

    keys: Tensor
    sources: Tensor

    def __init__(self, dimension: int, size: int, length: float = 1.0, queries: int | None = None) -> None:
        super().__init__()
        self.queries = size if queries is None else queries
        self.temperature = TEMPERATURE * length
        self.register_buffer("keys", torch.zeros(size, dimension))
        self.register_buffer("sources", torch.arange(size))
        self.values = nn.Parameter(torch.zeros(size, dimension))
        self.metric = nn.Parameter(torch.zeros(dimension, dimension))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, queries: Tensor, shares: Tensor) -> Tensor:
        """m(x) of training queries, (b, d).

        Args:
            queries: (b, d).
            shares: (b,) from 0 to 1: query i is moved by that share of its shift, and attends to nothing that
                is known from a query that equals it. A memory trained at every share can be served at any,
                and one that showed queries what it knows of them would only learn to copy that. A query that
                is left with no key stays where it is.
        """
        logits = self._logits(queries)
        lengths = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        same = (queries @ self.keys[: self.queries].T >= _SAME * lengths)[:, self.sources]
        # Not −∞: a row of nothing else would be NaN.
        attention = torch.softmax(logits.masked_fill_(same, torch.finfo(logits.dtype).min), dim=1)
        shares = shares.masked_fill(same.all(dim=1), 0.0)
        return queries + shares[:, None] * self._shift(attention)

    def served_shift(self, queries: Tensor) -> Tensor:
        """m(x) − x as it is served, (b, d), of queries, (b, d)."""
        return self._shift(torch.softmax(self._logits(queries), dim=1))

    def _logits(self, queries: Tensor) -> Tensor:
        return (queries + queries @ self.metric) @ self.keys.T / self.temperature

    def _shift(self, attention: Tensor) -> Tensor:
        return _SCALE * self.scale * (attention @ self.values)

    def scaled_values(self) -> Tensor:
        """Values times s, (n, d)."""
        return _SCALE * self.scale * self.values

    def served_keys(self) -> Tensor:
        """Keys as x itself finds them, divided by the temperature, (n, d)."""
        return (self.keys + self.keys @ self.metric.T) / self.temperature

    def modules_to_serve(self) -> tuple[Dense, Dense]:
        """The memory as it is now, as two modules behind an encoder."""
        from sentence_transformers.base.modules import Dense

        size, dimension = self.keys.shape
        wide = size + dimension
        attend = Dense(dimension, wide, activation_function=nn.Softmax(dim=1), use_residual=True)
        add = Dense(wide, dimension, bias=False, activation_function=nn.Identity())
        with torch.no_grad():
            for weights in (*attend.parameters(), *add.parameters()):
                weights.zero_()
            attend.linear.weight[:size] = self.served_keys()
            attend.linear.bias[size:] = _NEVER
            attend.residual.weight[size:].fill_diagonal_(1.0)
            add.linear.weight[:, :size] = self.scaled_values().T
            add.linear.weight[:, size:].fill_diagonal_(1.0)
        device = self.keys.device
        return attend.to(device), add.to(device)


@dataclass(frozen=True)
class Served:
    """A memory found in an encoder: a query moves by softmax(query @ keys.T) @ values.

    Attributes:
        keys: (n, d) float32, with the metric, divided by the temperature.
        values: (n, d) float32, times the scale.
    """

    keys: np.ndarray
    values: np.ndarray


def is_attention(module: nn.Module) -> bool:
    """Whether a module is the first of the two that serve a memory."""
    from sentence_transformers.base.modules import Dense

    return (
        isinstance(module, Dense)
        and module.use_residual
        and isinstance(module.activation_function, nn.Softmax)
        and module.out_features > module.in_features
    )


def memory_modules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those among an encoder's modules that serve a memory, two for each."""
    firsts = [place for place, module in enumerate(modules) if is_attention(module)]
    return [module for place in firsts for module in modules[place : place + 2]]


def read_memory(attend: Dense, add: Dense) -> Served:
    """The arrays of the two modules that serve a memory."""
    size = attend.out_features - attend.in_features
    keys = attend.linear.weight[:size].detach().float().cpu()
    values = add.linear.weight[:, :size].T.detach().float().cpu().contiguous()
    return Served(keys.numpy(), values.numpy())


def name_softmax_dimension(modules: Sequence[nn.Module]) -> None:
    """Say along which dimension loaded memories attend; a folder cannot, and torch would warn of guessing."""
    for module in modules:
        if is_attention(module):
            cast(nn.Softmax, module.activation_function).dim = 1
