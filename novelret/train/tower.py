"""The query tower: the part that is trained, from query rows to embeddings with gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from novelret import encode
from novelret.adapted import NUMBERS
from novelret.errors import UserError
from novelret.memory import Memory, memory_modules
from novelret.train.noise import uniform

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LENGTH_CLASSES = 4
_SHARES = 0  # the stream of a memory's random shares, by query; the sampler's of that number are by place


@dataclass(frozen=True)
class Tower:
    """What the trainer needs of a query encoder, whatever part of it is trained.

    Attributes:
        module: holds the trainable parameters.
        embed: (rows of the training queries, step) → (n, d) float32 embeddings with gradient.
        embed_validation: S shares → S times (V, d) float32 embeddings of the validation queries, moved by
            these shares of what a memory adds, without gradient.
        finished: () → the whole query encoder as it is now, ready to be saved.
        frozen: how many of its first modules are not trained.
        memory: the one among what is trained.
    """

    module: nn.Module
    embed: Callable[[np.ndarray, int], Tensor]
    embed_validation: Callable[[Sequence[float]], list[np.ndarray]]
    finished: Callable[[], SentenceTransformer]
    frozen: int = 0
    memory: Memory | None = None


def full_tower(
    model: SentenceTransformer,
    train_texts: list[str],
    validation_texts: list[str],
    precision: str,
    *,
    gradient_checkpointing: bool = False,
) -> Tower:
    """Train every weight of the query encoder.

    Dropout stays off: the reward is about a ranking that the deployed encoder would give, and a run is
    then the same however it is cut into micro-batches. Weights that are stored in half precision are trained
    and saved in single precision, which small updates need; `precision` is of the forward pass alone.

    Raises:
        UserError: the encoder is an embedding API, whose weights are out of reach, or does not support
            gradient checkpointing.
    """
    if encode.is_api(model):
        raise UserError("--tune full: the query encoder is an embedding API; use --tune adapter or memory")
    normalized = encode.is_normalized(model)
    model.float().requires_grad_(True)
    for module in memory_modules([*model]):
        module.requires_grad_(False)  # half of their weights are constants that make them what they are
    model.eval()
    if gradient_checkpointing:
        _checkpoint_layers(model)

    def embed(rows: np.ndarray, _: int) -> Tensor:
        # A query that stands in the batch twice is embedded once; on a CPU, where padding costs as much as
        # words do, queries of like length go together.
        unique, place = np.unique(rows, return_inverse=True)
        texts = [train_texts[row] for row in unique]
        order = np.argsort([len(text) for text in texts], kind="stable")
        parts = np.array_split(order, _LENGTH_CLASSES if model.device.type == "cpu" else 1)
        embedded = torch.cat([embed_texts([texts[n] for n in part]) for part in parts if len(part)])
        return embedded[torch.from_numpy(np.argsort(order)[place])]

    def embed_texts(texts: list[str]) -> Tensor:
        features = encode.query_features(model, texts)
        features = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        with torch.autocast(model.device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            embeddings: Tensor = model(features, task="query")["sentence_embedding"].float()
        # The gradient of a length of 0 is without bounds; an encoder may know none of a query's words.
        embeddings = torch.where(embeddings.any(dim=1, keepdim=True), embeddings, embeddings.detach())
        return normalize(embeddings, dim=1) if normalized else embeddings

    def embed_validation(shares: Sequence[float]) -> list[np.ndarray]:
        embeddings = encode.encode_queries(model, validation_texts)
        if gradient_checkpointing:
            _checkpoint_layers(model)  # encoding has switched the layers back to evaluation
        return [embeddings] * len(shares)  # there is no memory

    return Tower(model, embed, embed_validation, lambda: model.eval())


def lora_tower(
    model: SentenceTransformer,
    train_texts: list[str],
    validation_texts: list[str],
    precision: str,
    *,
    rank: int,
    seed: int,
    gradient_checkpointing: bool = False,
) -> Tower:
    """Train low-rank updates of the query encoder's linear layers; the saved model holds them merged.

    Args:
        model: the query encoder; its first module must be a transformer.
        train_texts: Q training queries.
        validation_texts: V validation queries.
        precision: of the forward pass.
        rank: of the updates, scaled by 2 (alpha = 2 · rank).
        seed: decides the matrices that the updates start from.
        gradient_checkpointing: compute activations again in the backward pass.

    Raises:
        UserError: peft is not installed, or there is no transformer to add to.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError('--tune lora: peft is not installed; pip install "novelret[lora]"') from None
    transformer = getattr(model[0], "model", None)
    if transformer is None or encode.is_api(model):
        raise UserError(
            f"--tune lora: {type(model[0]).__name__} is no transformer; use --tune adapter or memory"
        )
    transformer.float()  # the updates are merged into these weights
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, not ours to mend
        torch.manual_seed(seed)  # the updates start from random matrices, the same in every process
        wrapped = get_peft_model(transformer, lora)
    trainable = {id(p) for p in wrapped.parameters() if p.requires_grad}
    model[0].model = wrapped
    tower = full_tower(
        model,
        train_texts,
        validation_texts,
        precision,
        gradient_checkpointing=gradient_checkpointing,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)

    def finished() -> SentenceTransformer:
        merged = copy.deepcopy(model)
        merged[0].model = merged[0].model.merge_and_unload()
        return merged.eval()

    return replace(tower, finished=finished)


def _checkpoint_layers(model: SentenceTransformer) -> None:
    """Let each layer forget its activations; only layers themselves go into training mode, not dropout.

    Raises:
        UserError: the encoder cannot do that.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    transformer = getattr(model[0], "model", None)
    if transformer is None or not getattr(transformer, "supports_gradient_checkpointing", False):
        kind = type(model[0] if transformer is None else transformer).__name__
        raise UserError(
            f"--gradient-checkpointing: {kind} does not support it; leave it out, or lower --micro-batch"
        )
    enable = getattr(transformer, "activation_checkpointing_enable", None)  # the newer name
    (enable or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():  # some layers call dropout themselves
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def adapter_tower(
    model: SentenceTransformer,
    train: np.ndarray,
    validation: np.ndarray,
    device: str,
    memory: Memory | None = None,
    seed: int = 0,
) -> Tower:
    """Train a residual linear map behind the frozen encoder, from embeddings computed once.

    q ↦ (q + Wq) / |q + Wq|, W = 0 at the start. It is saved as sentence-transformers' own Dense and
    Normalize modules, so the result loads anywhere.

    Args:
        model: the frozen query encoder.
        train: (Q, d) float32 its embeddings of the training queries.
        validation: (V, d) float32 its embeddings of the validation queries.
        device: where to train.
        memory: trained too, in front of the map, which then takes m(q), at a share of the memory that is
            drawn anew for each query and step.
        seed: decides these shares.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

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
    module = dense if memory is None else nn.ModuleList([memory.to(device), dense])

    def mapped(queries: Tensor) -> Tensor:
        moved: Tensor = dense({"sentence_embedding": queries})["sentence_embedding"]
        return normalize(moved, dim=1) if normalized else moved

    def embed(rows: np.ndarray, step: int) -> Tensor:
        queries = torch.from_numpy(train[rows]).to(device)
        if memory is None:
            return mapped(queries)
        places = torch.from_numpy(rows)
        shares = uniform(seed, _SHARES, step, places, torch.zeros_like(places))
        return mapped(memory(queries, shares.float().to(device)))

    # A query takes a number for each key.
    at_once = max(1, NUMBERS // (dimension if memory is None else len(memory.keys)))

    @torch.no_grad()
    def embed_validation(shares: Sequence[float]) -> list[np.ndarray]:
        queries = torch.from_numpy(validation).to(device)
        shift = torch.zeros_like(queries)
        if memory is not None:
            shift = torch.cat([memory.served_shift(part) for part in queries.split(at_once)])
        return [mapped(queries + share * shift).cpu().numpy() for share in shares]

    # A memory adds to embeddings of the length that it was trained with.
    shortened = memory is not None and normalized and not isinstance(model[-1], Normalize)

    def finished() -> SentenceTransformer:
        modules = [
            *model,
            *([Normalize()] if shortened else []),
            *(memory.modules_to_serve() if memory is not None else ()),
            dense,
            *([Normalize()] if normalized else []),
        ]
        whole = SentenceTransformer(
            modules=modules,
            device=device,
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name=model.similarity_fn_name,
        )
        return whole.eval()

    return Tower(module, embed, embed_validation, finished, len(model) + shortened, memory)
