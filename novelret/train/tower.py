"""The query tower: the part that is trained, from query rows to embeddings with gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn
from torch.nn.functional import normalize

from novelret import encode
from novelret.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tower:
    """What the trainer needs of a query encoder, whatever part of it is trained.

    Attributes:
        module: holds the trainable parameters.
        embed: (rows of the training queries) → (n, d) float32 embeddings with gradient.
        embed_validation: () → (V, d) float32 embeddings of the validation queries, without gradient.
        finished: () → the whole query encoder as it is now, ready to be saved.
    """

    module: nn.Module
    embed: Callable[[np.ndarray], Tensor]
    embed_validation: Callable[[], np.ndarray]
    finished: Callable[[], SentenceTransformer]


def full_tower(
    model: SentenceTransformer, train_texts: list[str], validation_texts: list[str], precision: str
) -> Tower:
    """Train every weight of the query encoder.

    Dropout stays off: the reward is about a ranking that the deployed encoder would give, and a run is
    then the same however it is cut into micro-batches.

    Raises:
        UserError: the encoder is an embedding API, whose weights are out of reach.
    """
    if encode.is_api(model):
        raise UserError("--tune full: the query encoder is an embedding API; use --tune adapter")
    normalized = encode.is_normalized(model)
    model.requires_grad_(True)
    model.eval()

    def embed(rows: np.ndarray) -> Tensor:
        features = encode.query_features(model, [train_texts[row] for row in rows])
        features = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        with torch.autocast(model.device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            embeddings: Tensor = model(features, task="query")["sentence_embedding"]
        return normalize(embeddings.float(), dim=1) if normalized else embeddings.float()

    def embed_validation() -> np.ndarray:
        return encode.encode_queries(model, validation_texts)

    return Tower(model, embed, embed_validation, lambda: model)


def adapter_tower(
    model: SentenceTransformer, train: np.ndarray, validation: np.ndarray, device: str
) -> Tower:
    """Train a residual linear map behind the frozen encoder, from embeddings computed once.

    q ↦ (q + Wq) / |q + Wq|, W = 0 at the start. It is saved as sentence-transformers' own Dense and
    Normalize modules, so the result loads anywhere.

    Args:
        model: the frozen query encoder.
        train: (Q, d) float32 its embeddings of the training queries.
        validation: (V, d) float32 its embeddings of the validation queries.
        device: where to train.
    """
    dimension = train.shape[1]
    dense = Dense(
        dimension,
        dimension,
        bias=False,
        activation_function=nn.Identity(),
        init_weight=torch.zeros(dimension, dimension),
        use_residual=True,
    ).to(device)
    normalized = encode.is_normalized(model)

    def apply(embeddings: np.ndarray) -> Tensor:
        batch = torch.from_numpy(embeddings).to(device)
        moved: Tensor = dense({"sentence_embedding": batch})["sentence_embedding"]
        return normalize(moved, dim=1) if normalized else moved

    def embed_validation() -> np.ndarray:
        with torch.no_grad():
            return apply(validation).cpu().numpy()

    def finished() -> SentenceTransformer:
        modules = [*model, dense, *([Normalize()] if normalized else [])]
        whole = SentenceTransformer(
            modules=modules,
            device=device,
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name=model.similarity_fn_name,
        )
        return whole.eval()

    return Tower(dense, lambda rows: apply(train[rows]), embed_validation, finished)
