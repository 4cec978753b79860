"""Take a finetuned query encoder to where it is served: sentence-transformers, ONNX, or a few arrays.

A matrix is all there is to an adapter: whoever serves embeddings elsewhere, or buys them from an API,
multiplies the query embeddings they have by it, in front of the unchanged index. A memory in front of the
matrix adds keys and values, which turn deployed query embeddings into new ones like this:

    if normalize: queries /= norm(queries)            # of unit length, as the deployed encoder gives them
    moved = (queries + softmax(queries @ keys.T) @ values) @ matrix
    if normalize: moved /= norm(moved)
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn
from transformers import AutoTokenizer

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_of,
    open_output,
    read_json,
    writable,
    write_json,
    write_manifest,
)
from novelret.errors import UserError
from novelret.index import open_index
from novelret.memory import is_attention, memory_modules, read_memory
from novelret.progress import Reporter
from novelret.trained import MIRRORED, QUERIES, Training, training_of

FORMATS = ("st", "onnx", "npz")
TOLERANCE = 1e-4
_SAMPLES = ("a", "grey settee", "What is the best " + "very " * 40 + "long question?", "007 ünïcödé 家具")
# Batches of other sizes and lengths than the traced one; the last text is longer than most encoders take.
_BATCHES = ([_SAMPLES[1]], list(_SAMPLES), [_SAMPLES[0]] * 17, ["grey settee " * 300])
_NO_LIMIT = 2**31  # tokenizers without a longest input say 10³⁰, which none takes


@dataclass(frozen=True)
class Exported:
    """What an export gave.

    Attributes:
        path: the folder or file.
        format: "st", "onnx" or "npz".
        dimension: of an embedding.
        difference: the largest difference between the exported and the original embeddings that was seen.
        keys: how many a memory holds that was written as arrays, else 0.
    """

    path: Path
    format: str
    dimension: int
    difference: float
    keys: int = 0


def export_model(
    model: Path, form: str, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Exported:
    """Write a query encoder in another form, and check that it gives the same embeddings.

    Args:
        model: MODEL folder, or any sentence-transformers folder.
        form: "st", "onnx" (folder with model.onnx and its tokenizer) or "npz" (one file).
        out: what to make.
        force: replace what is there.
        report: for notes.

    Raises:
        UserError: unknown format, unreadable model, a model that this format cannot hold, or `out` exists.
    """
    report = report or Reporter()
    if form not in FORMATS:
        raise UserError(f"--format {form}: unknown; choose from {', '.join(FORMATS)}")
    if form == "npz":
        _check_file(out, force=force)
    else:
        check_output(out, force=force, kind="export", inputs=[str(model)])
    encoder = encode.load_encoder(model, "cpu").eval()
    keys = 0
    if form == "npz":
        difference, keys = _write_arrays(encoder, model, out, report)
    else:
        identity = fingerprint_of(form, encode.fingerprint_encoder(encoder))
        write = _write_onnx if form == "onnx" else _write_folder
        with open_output(out, identity, force=force) as folder:
            difference = write(encoder, model, folder)
            facts = {"difference": difference, "dimension": encoder.get_embedding_dimension()}
            training = training_of(model)
            if training is not None:
                facts["training"] = training.facts()
                for name in (QUERIES, MIRRORED):
                    np.save(folder / name, training.hashes(name))
            inputs = {"model": encode.fingerprint_encoder(encoder)}
            settings = {"model": str(model), "format": form}
            write_manifest(folder, Manifest("export", settings, inputs, identity, facts))
    return Exported(out, form, int(encoder.get_embedding_dimension() or 0), difference, keys)


def _check_file(out: Path, *, force: bool) -> None:
    """Refuse what cannot become the one file of npz, before the model is loaded."""
    with writable(out):
        if out.suffix != ".npz" or out.is_dir():
            raise UserError(f"{out}: --format npz makes one file; name it like adapter.npz")
        if out.exists() and not force:
            raise UserError(f"{out}: exists already; give another --out, or --force to replace it")


def _write_folder(encoder: SentenceTransformer, model: Path, folder: Path) -> float:
    encoder.save(str(folder), create_model_card=False)
    if (model / "README.md").is_file():
        shutil.copyfile(model / "README.md", folder / "README.md")
    if encode.is_api(encoder):
        return 0.0
    again = encode.load_encoder(folder, "cpu")
    return _difference(
        encode.encode_queries(again, list(_SAMPLES)), encode.encode_queries(encoder, list(_SAMPLES))
    )


class _Whole(nn.Module):
    """Tensors in, embeddings out, with the normalisation that novelret applies."""

    def __init__(self, encoder: SentenceTransformer, names: list[str]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, names
        self.normalized = encode.is_normalized(encoder)

    def forward(self, *tensors: Tensor) -> Tensor:
        features: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        for module in self.encoder:
            features = module(features)
        embeddings: Tensor = features["sentence_embedding"]
        return nn.functional.normalize(embeddings, dim=1) if self.normalized else embeddings


def _write_onnx(encoder: SentenceTransformer, model: Path, folder: Path) -> float:
    """Write model.onnx (any batch size and length), the tokenizer, and how to call both."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise UserError("--format onnx needs more packages: pip install 'novelret[onnx]'") from None
    features = encode.query_features(encoder, list(_SAMPLES))
    names = [name for name, value in features.items() if isinstance(value, Tensor)]
    if encode.is_api(encoder) or "attention_mask" not in names:
        raise UserError(
            f"{model}: begins with {type(encoder[0]).__name__}, ONNX takes transformers; use another --format"
        )
    prompt = encode.query_prompt(encoder) or ""
    if prompt and not all(getattr(module, "include_prompt", True) for module in encoder.modules()):
        raise UserError(
            f"{model}: its pooling leaves the query prompt's tokens out, which an ONNX graph cannot tell "
            "apart; use --format st"
        )
    # By the encoder as it is served today, before anything is changed for the tracing.
    expected = [encode.encode_queries(encoder, texts) for texts in _BATCHES]
    encoder[0].auto_model.set_attn_implementation("eager")  # fused attention cannot be traced
    whole = _Whole(encoder, names)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    path = folder / "model.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about axis names
        try:
            torch.onnx.export(
                whole,
                tuple(features[name] for name in names),
                str(path),
                input_names=names,
                output_names=["sentence_embedding"],
                dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # whatever the exporter raises, the user needs one line
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{model}: cannot be exported to ONNX ({reason})") from None
    encoder.tokenizer.save_pretrained(str(folder))
    longest = encoder.max_seq_length
    write_json(
        folder / "novelret.json",
        {
            "inputs": names,
            "output": "sentence_embedding",
            "prompt": prompt,
            "max_length": longest if longest is not None and longest < _NO_LIMIT else None,
        },
    )
    difference = _compare_onnx(model, folder, onnxruntime.InferenceSession(str(path)), expected)
    if not difference <= TOLERANCE:  # not a number is no agreement
        raise UserError(
            f"{model}: the ONNX embeddings differ from the encoder's by {difference:.1e}, more than "
            f"{TOLERANCE:g}; use --format st"
        )
    return difference


def _compare_onnx(model: Path, folder: Path, session: Any, expected: list[np.ndarray]) -> float:
    """The largest difference to the encoder, by nothing but the files that are served.

    Args:
        model: what is exported, for messages.
        folder: holds the tokenizer and novelret.json.
        session: of its model.onnx.
        expected: (n, d) query embeddings of each of `_BATCHES`.

    Raises:
        UserError: the tokenizer does not give what the graph takes.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    how = read_json(folder / "novelret.json")
    worst = []
    for texts, original in zip(_BATCHES, expected, strict=True):
        tokens = tokenizer(
            [how["prompt"] + text for text in texts],
            padding=True,
            truncation=True,
            max_length=how["max_length"],
            return_tensors="np",
        )
        lacking = [name for name in how["inputs"] if name not in tokens]
        if lacking:
            raise UserError(
                f"{model}: takes {lacking[0]}, which its tokenizer does not give; use --format st"
            )
        (found,) = session.run(None, {name: tokens[name].astype(np.int64) for name in how["inputs"]})
        worst.append(_difference(found, original))
    return float(np.max(worst))


def _write_arrays(
    encoder: SentenceTransformer, model: Path, out: Path, report: Reporter
) -> tuple[float, int]:
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
    difference = _difference(_serve(samples.numpy(), arrays), features["sentence_embedding"].numpy())
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


def _serve(queries: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
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


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())
