"""What stands behind the deployed encoder as a few arrays, for whoever serves embeddings elsewhere.

A matrix is all there is to an adapter: the query embeddings that one has, or buys from an API, are multiplied
by it, in front of the unchanged index. A memory in front of the matrix adds keys and values, which turn
deployed query embeddings into new ones like this:

    if normalize: queries /= norm(queries)            # of unit length, as the deployed encoder gives them
    moved = (queries + softmax(queries @ keys.T) @ values) @ matrix
    if normalize: moved /= norm(moved)
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from novelret import encode
from novelret.artifacts import writable
from novelret.errors import UserError
from novelret.export.difference import TOLERANCE, difference_of
from novelret.index import open_index
from novelret.memory import is_attention, memory_modules, read_memory
from novelret.progress import Reporter
from novelret.trained import Training, training_of


def write_arrays(encoder: SentenceTransformer, model: Path, out: Path, report: Reporter) -> tuple[float, int]:
    """Write {matrix (d, d) float32, normalize}: new query = deployed query @ matrix, then normalised.

    Of a memory also {keys (n, d), values (n, d)}: see the module's docstring.

    Returns:
        the largest difference to the encoder's own modules on random embeddings, and the number of keys.
    """
    modules = list(encoder)
    first = len(modules)
    while first and (_is_behind(modules[first - 1]) or (first > 1 and is_attention(modules[first - 2]))):
        first -= 1
    # The deployed encoder may end with a Normalize of its own; it stands before the first adapter.
    while first < len(modules) and isinstance(modules[first], Normalize):
        first += 1
    if first == len(modules):
        raise UserError(
            f"{model}: is no adapter behind a frozen encoder (train it with --tune adapter or memory); "
            "use --format st"
        )
    behind = modules[_deployed_end(model, modules, first, encoder, report) :]
    if memory_modules(behind[1:]):
        raise UserError(
            f"{model}: its memory stands behind another adapter, and arrays hold one in front of a matrix "
            "only; use --format st or onnx"
        )
    for module in behind:
        module.float()  # an encoder that is stored in half precision has its adapter so, too
    arrays = _arrays(behind, int(encoder.get_embedding_dimension() or 0), encode.is_normalized(encoder))
    samples = nn.functional.normalize(
        torch.randn(64, arrays["matrix"].shape[0], generator=torch.Generator().manual_seed(0)), dim=1
    )
    features: dict[str, Any] = {"sentence_embedding": samples}
    with torch.no_grad():
        for module in behind:
            features = module(features)
    difference = difference_of(serve(samples.numpy(), arrays), features["sentence_embedding"].numpy())
    if difference > TOLERANCE:
        raise UserError(
            f"{model}: arrays would give embeddings that differ from the encoder's by {difference:.1e}, more "
            f"than {TOLERANCE:g}; use --format st or onnx"
        )
    temporary = out.with_name(out.name + ".tmp")
    with writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(out)
    return difference, len(arrays.get("keys", ()))


def _arrays(behind: list[nn.Module], dimension: int, normalized: bool) -> dict[str, np.ndarray]:
    matrix = torch.eye(dimension)
    for module in behind:
        if _is_adapter(module):
            weight = cast(Dense, module).linear.weight
            matrix = matrix + matrix @ weight.detach().float().T
    arrays = {"matrix": matrix.numpy(), "normalize": np.array(normalized)}
    if is_attention(behind[0]):
        memory = read_memory(cast(Dense, behind[0]), cast(Dense, behind[1]))
        arrays |= {"keys": memory.keys, "values": memory.values}
    return arrays


def serve(queries: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What whoever holds the arrays computes from deployed embeddings of unit length, (Q, d)."""
    if "keys" in arrays:
        logits = queries @ arrays["keys"].T
        attention = np.exp(logits - logits.max(axis=1, keepdims=True))
        queries = queries + attention / attention.sum(axis=1, keepdims=True) @ arrays["values"]
    moved: np.ndarray = queries @ arrays["matrix"]
    return moved / np.linalg.norm(moved, axis=1, keepdims=True) if arrays["normalize"] else moved


def _is_behind(module: nn.Module) -> bool:
    return isinstance(module, Normalize) or _is_adapter(module) or is_attention(module)


def _is_adapter(module: nn.Module) -> bool:
    return (
        isinstance(module, Dense)
        and bool(module.use_residual)
        and module.linear.bias is None
        and isinstance(module.activation_function, nn.Identity)
        and module.in_features == module.out_features
    )


def _deployed_end(
    model: Path, modules: list[nn.Module], first: int, encoder: SentenceTransformer, report: Reporter
) -> int:
    """Where the deployed encoder ends, for whose embeddings arrays are; it may end in an adapter of its own.

    Args:
        model: the folder.
        modules: of the encoder.
        first: where the last adapters and memories begin; the end, as far as nothing else is known.
        encoder: the whole.
        report: for a warning where the index is gone.

    Raises:
        UserError: the deployed encoder does not stand in front, or it is not known which part of it does.
    """
    training = training_of(model)
    if training is None:
        return first
    deployed = training.deployed or _deployed_of(training)
    if deployed is None:  # a model of before, whose index is gone
        if sum(map(_is_adapter, modules[first:])) > 1:
            raise UserError(
                f"{model}: several adapters stand behind one another, and only the index "
                f"({training.index_folder}) tells which of them are deployed; call from where it lies there, "
                "or use --format st or onnx"
            )
        if training.init is not None:
            report.warn(f"{model}: was trained from {training.init}; the matrix is for its embeddings")
        return first
    for end in range(first, len(modules)):
        front = modules[:end]
        # In front of a memory stands a Normalize that the deployed encoder may lack.
        fronts = [front, front[:-1]] if isinstance(front[-1], Normalize) else [front]
        if deployed in [_fingerprint(of, encoder) for of in fronts]:
            return end
    raise UserError(
        f"{model}: its adapter stands behind {training.init or 'an encoder'}, whose weights are not the "
        f"deployed ones of {training.index_folder}, so no matrix takes the deployed embeddings there; use "
        "--format st or onnx"
    )


def _deployed_of(training: Training) -> str | None:
    """The deployed query encoder's fingerprint from the index itself, which models of before do not hold."""
    with contextlib.suppress(UserError):
        index = open_index(training.index_folder)
        if index.descends_from(training.index):
            return index.manifest.inputs["query_encoder"]
    return None


def _fingerprint(front: list[nn.Module], encoder: SentenceTransformer) -> str:
    """Of the first modules of an encoder, as an encoder of their own."""
    whole = SentenceTransformer(
        modules=front,
        device="cpu",
        prompts=encoder.prompts,
        default_prompt_name=encoder.default_prompt_name,
        similarity_fn_name=encoder.similarity_fn_name,
    )
    return encode.fingerprint_encoder(whole)
