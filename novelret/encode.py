"""Encoders: sentence-transformers models, for items and for queries, with the prompts they carry."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from novelret.artifacts import fingerprint_of, read_json
from novelret.errors import UserError, first_line
from novelret.memory import name_softmax_dimension

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from novelret.embedding_api import ApiEmbedding

_OWN_MODULE = "novelret.embedding_api.ApiEmbedding"


def pick_device(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU is there, else "cpu".

    Raises:
        UserError: the name is no device's, or a GPU was asked for and there is none.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        raise UserError(f"--device {device}: unknown; choose from auto, cpu, cuda and cuda:NUMBER")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine shows no CUDA GPU; use --device cpu")
    number = device.removeprefix("cuda:")
    if number.isdecimal() and int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: no such GPU, this machine shows {torch.cuda.device_count()}")
    return device


def hush_libraries() -> None:
    """Keep the libraries' bars and retries from mixing with ours; what matters comes back as an exception."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("sentence_transformers", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()


def load_encoder(path: str | Path, device: str = "cpu") -> SentenceTransformer:
    """Load a sentence-transformers model from a folder or by its hub id, or make one for `openai:MODEL`.

    Raises:
        UserError: it cannot be read, compares embeddings by a distance, or the embedding API refuses.
    """
    # Takes longer to load than all else together: many commands find what they need in the index.
    from sentence_transformers import SentenceTransformer

    from novelret.embedding_api import PREFIX, make_module

    hush_libraries()
    if str(path).startswith(PREFIX):
        return SentenceTransformer(modules=[make_module(str(path))], device=device)
    is_path = Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if is_path and not Path(path).is_dir():
        raise UserError(f"{path}: no such model folder")
    if is_path and not (Path(path) / "modules.json").is_file() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: holds no sentence-transformers model (no modules.json)")
    if not is_path and "/" in str(path) and Path(path).parent.is_dir():  # no hub id, but a slip of the pen
        raise UserError(f"{path}: no such model folder")
    gc.collect()  # encoders refer to themselves: of a sweep, each would stay in memory
    try:
        model = SentenceTransformer(str(path), device=device, trust_remote_code=has_own_modules(Path(path)))
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise on a broken model, the user needs one line
        missing = "" if is_path else "is no folder here, and "
        raise UserError(f"{path}: {missing}the model cannot be read ({first_line(error)})") from None
    if str(model.similarity_fn_name) not in ("cosine", "dot"):
        raise UserError(
            f"{path}: compares by {model.similarity_fn_name} distance, novelret by cosine or dot product; if "
            "the deployed system does so, set similarity_fn_name in its config_sentence_transformers.json"
        )
    name_softmax_dimension([*model])
    _truncate_by_modules(model)
    return model


def _truncate_by_modules(model: SentenceTransformer) -> None:
    """Let modules cut the embeddings to `truncate_dim` (Matryoshka), which is a setting of `encode` alone.

    What is trained behind an encoder, and what runs its modules elsewhere, then sees what `encode` gives.
    """
    from sentence_transformers.base.modules import Dense, Normalize

    width, model.truncate_dim = model.truncate_dim, None
    whole = model.get_embedding_dimension()
    if width is None or whole is None or width >= whole:
        return
    first = torch.eye(width, whole, dtype=next(model.parameters()).dtype)
    cut = Dense(whole, width, bias=False, activation_function=torch.nn.Identity(), init_weight=first)
    model.append(cut.requires_grad_(False).to(model.device))
    if is_normalized(model):
        model.append(Normalize())


def has_own_modules(folder: Path) -> bool:
    """Whether the only modules outside sentence-transformers are novelret's own, which may then be loaded."""
    if not (folder / "modules.json").is_file():
        return False
    types = {str(module.get("type")) for module in read_json(folder / "modules.json")}
    others = {name for name in types if not name.startswith("sentence_transformers.")}
    return others == {_OWN_MODULE}


def is_api(model: SentenceTransformer) -> bool:
    """Whether the embeddings come from an embedding API, whose weights cannot be trained."""
    return bool(_api_modules(model))


def count_unpaid(model: SentenceTransformer, texts: list[str]) -> int:
    """How many queries an embedding API would have to be paid for; 0 with weights of one's own."""
    return sum(module.count_unknown(texts, query_prompt(model)) for module in _api_modules(model))


def _api_modules(model: SentenceTransformer) -> list[ApiEmbedding]:
    from novelret.embedding_api import ApiEmbedding

    return [module for module in model if isinstance(module, ApiEmbedding)]


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Hash of a model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_encoder(model: SentenceTransformer) -> str:
    """Identity of an encoder: its weights and everything else that decides an embedding."""
    return fingerprint_of(
        fingerprint_weights(model),
        [(type(module).__name__, settings_of(module), tokenizer_of(module)) for module in model],
        model.prompts,
        model.default_prompt_name,
        model.max_seq_length,
        model.truncate_dim,
        *(() if is_normalized(model) else ("dot",)),
    )


def settings_of(module: torch.nn.Module) -> list[Any]:
    """What decides a module's output beside its weights: pooling, activations, heads, the longest input."""
    from sentence_transformers.base.modules import Module

    config = getattr(getattr(module, "model", None), "config", None)
    architecture = {} if config is None else config.to_dict()
    for told in ("_name_or_path", "transformers_version"):  # where it came from and who wrote it
        architecture.pop(told, None)
    known = module.get_config_dict() if isinstance(module, Module) else {}
    return [architecture, known, getattr(module, "max_seq_length", None)]


def tokenizer_of(module: torch.nn.Module) -> str | None:
    """The whole tokenizer as text; None for a module without one, "" for one that cannot be written."""
    tokenizer = getattr(module, "tokenizer", None)
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(tokenizer, "to_str"):
        return ""
    # Padding and truncation are what the last call asked for.
    return json.dumps(json.loads(tokenizer.to_str()) | {"padding": None, "truncation": None}, sort_keys=True)


def is_normalized(model: SentenceTransformer) -> bool:
    """Whether novelret normalises this model's embeddings: it does unless the model asks for dot products."""
    return str(model.similarity_fn_name) != "dot"


def encode_items(model: SentenceTransformer, texts: list[str], batch_size: int) -> np.ndarray:
    """Item embeddings, (n, d) float32, with the model's document prompt."""
    return _encoded(model, model.encode_document, texts, batch_size)


def encode_queries(model: SentenceTransformer, texts: list[str], batch_size: int = 128) -> np.ndarray:
    """Query embeddings, (n, d) float32, with the model's query prompt."""
    return _encoded(model, model.encode_query, texts, batch_size)


def _encoded(
    model: SentenceTransformer, encode: Callable[..., np.ndarray], texts: list[str], batch_size: int
) -> np.ndarray:
    if not texts:  # which it would give no dimension
        return np.zeros((0, int(model.get_embedding_dimension() or 0)), dtype=np.float32)
    if is_api(model):
        batch_size = len(texts)  # its requests have their own size, and several are under way at once
    embeddings = encode(
        texts, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=is_normalized(model)
    )
    return embeddings.astype(np.float32, copy=False)


def query_features(model: SentenceTransformer, texts: list[str]) -> dict[str, Any]:
    """Tokenised queries as the model's forward pass takes them, prompt included."""
    features: dict[str, Any] = model.preprocess(texts, prompt=query_prompt(model), task="query")
    return features


def query_prompt(model: SentenceTransformer) -> str | None:
    """The prompt that `encode_query` takes: the query prompt, though it be empty, before the default one."""
    name = "query" if "query" in model.prompts else model.default_prompt_name
    prompt: str | None = model.prompts.get(name)
    return prompt


def check_finite(embeddings: np.ndarray, what: str) -> None:
    """Refuse embeddings with NaN or infinite values.

    Raises:
        UserError: names the first bad row.
    """
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise UserError(
            f"{what}: embedding {int(bad[0])} is not finite; the model is broken or overflows in float16"
        )
