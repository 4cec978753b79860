"""A memory of the training queries, which moves a query towards what is relevant to queries like it.

    m(x) = x + s · Σ_j a_j v_j,   a = softmax_j(cos(x, k_j) / t)

Keys k_j are the deployed embeddings of training queries. Values v_j start at the mean embedding of the items
known to be relevant to query j and are trained, as is the scale s, which starts at 0: the deployed encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor, nn
from torch.nn.functional import normalize

TEMPERATURE = 0.06
_SCALE = 10.0  # s = 10 · `scale`, so that one learning rate does for a residual map, values and scale
_SAME = 1 - 1e-5  # cosine from which on two queries are the same one


class Memory(Module):
    """A module behind a query encoder; it keeps the dimension of `sentence_embedding`.

    Attributes:
        dimension: d, of an embedding.
        size: n, the number of keys.
        temperature: t of the attention.
        keys: (n, d) buffer, of unit length.
        values: (n, d) parameter.
        scale: () parameter, a tenth of s.
    """

    config_keys = ["dimension", "size", "temperature"]  # noqa: RUF012 (the base class declares it so)

    keys: Tensor

    def __init__(self, dimension: int, size: int, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.dimension = dimension
        self.size = size
        self.temperature = temperature
        self.register_buffer("keys", torch.zeros(size, dimension))
        self.values = nn.Parameter(torch.zeros(size, dimension))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Shifts `sentence_embedding`, (b, d), as when serving: any key may be attended to."""
        features["sentence_embedding"] = self.shift(features["sentence_embedding"])
        return features

    def shift(self, queries: Tensor, *, leave_one_out: bool = False) -> Tensor:
        """m(x) of queries, (b, d).

        Args:
            queries: (b, d).
            leave_one_out: attend to no key that equals the query. While training on the very queries that
                the memory holds, each would only learn to copy what it already knows of itself. A query
                that is left with no key stays where it is.
        """
        cosines = normalize(queries, dim=1) @ self.keys.T
        logits = cosines / self.temperature
        if leave_one_out:
            same = cosines >= _SAME
            # Not −∞: a row of nothing else would be NaN.
            logits = logits.masked_fill(same, torch.finfo(logits.dtype).min)
            attention = torch.softmax(logits, dim=1).masked_fill(same, 0.0)
        else:
            attention = torch.softmax(logits, dim=1)
        return queries + _SCALE * self.scale * (attention @ self.values)

    def scaled_values(self) -> Tensor:
        """Values times s, (n, d)."""
        return _SCALE * self.scale * self.values

    def get_embedding_dimension(self) -> int:
        """Dimensions of an embedding."""
        return self.dimension

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the configuration, and keys, values and scale as safetensors."""
        self.save_config(output_path)
        self.save_torch_weights(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> Memory:
        """Read what `save` wrote."""
        where = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        memory = cls(**cls.load_config(model_name_or_path, **where))
        return cls.load_torch_weights(model_name_or_path, model=memory, **where)
