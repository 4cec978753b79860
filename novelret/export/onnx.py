"""A query encoder as an ONNX graph with its tokenizer, compared with the original by what is served."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoTokenizer

from novelret import encode
from novelret.artifacts import read_json, write_json
from novelret.errors import UserError, first_line
from novelret.export.difference import SAMPLES, TOLERANCE, difference_of

# Batches of other sizes and lengths than the traced one; the last text is longer than most encoders take.
_BATCHES = ([SAMPLES[1]], list(SAMPLES), [SAMPLES[0]] * 17, ["grey settee " * 300])
_NO_LIMIT = 2**31  # tokenizers without a longest input say 10³⁰, which none takes


def write_onnx(encoder: SentenceTransformer, model: Path, folder: Path) -> float:
    """Write model.onnx (any batch size and length), the tokenizer, and how to call both."""
    features = encode.query_features(encoder, list(SAMPLES))
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
            raise UserError(f"{model}: cannot be exported to ONNX ({first_line(error)})") from None
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
        worst.append(difference_of(found, original))
    return float(np.max(worst))
