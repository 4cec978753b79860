"""Query encoders that are the deployed one with more modules behind it: an adapter, a memory.

Their embeddings come from the deployed ones, which an index keeps: no text is encoded anew.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from novelret import encode

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_AT_ONCE = 65_536  # queries
NUMBERS = 1 << 25
"""Float32 held between two modules at a time, 128 MB: a memory's activations are wide."""


def modules_behind(model: SentenceTransformer, deployed: SentenceTransformer) -> list[nn.Module] | None:
    """The modules of `model` behind those it shares with the deployed query encoder.

    Returns:
        the modules, none for the deployed encoder itself; or None where `model` must encode texts itself:
        weights, tokenizer, settings or prompts differ, or the deployed embeddings lack the length that the
        modules behind would see.
    """
    from sentence_transformers.base.modules import Dense, Normalize

    same = (
        len(model) >= len(deployed)
        and all(_is_same(ours, theirs) for ours, theirs in zip(model, deployed, strict=False))
        and model.prompts == deployed.prompts
        and model.default_prompt_name == deployed.default_prompt_name
        and model.truncate_dim is None
        and deployed.truncate_dim is None
        and encode.is_normalized(model) == encode.is_normalized(deployed)
    )
    if not same:
        return None
    behind = [*model][len(deployed) :]
    if not all(isinstance(module, Dense | Normalize) for module in behind):
        return None
    keeps_length = not encode.is_normalized(deployed) or isinstance(deployed[-1], Normalize)
    # Behind a Normalize there is no length left to be seen.
    seeing = takewhile(lambda module: not isinstance(module, Normalize), behind)
    return behind if keeps_length or all(_is_scale_free(module) for module in seeing) else None


def embed_behind(
    modules: list[nn.Module], embeddings: np.ndarray, *, normalized: bool, device: str
) -> np.ndarray:
    """What an encoder gives whose last modules are these, from the deployed embeddings, (Q, d) float32."""
    from sentence_transformers.base.modules import Dense

    parts = []
    # The modules of an encoder that is stored in half precision are, too.
    dtype = next((weights.dtype for module in modules for weights in module.parameters()), torch.float32)
    widest = max((module.out_features for module in modules if isinstance(module, Dense)), default=1)
    at_once = min(_AT_ONCE, max(1, NUMBERS // widest))
    with torch.inference_mode():
        for start in range(0, len(embeddings), at_once):
            part = torch.from_numpy(np.array(embeddings[start : start + at_once])).to(device, dtype)
            for module in modules:
                part = module({"sentence_embedding": part})["sentence_embedding"]
            part = part.float()
            parts.append((nn.functional.normalize(part, dim=1) if normalized else part).cpu().numpy())
    result: np.ndarray = np.concatenate(parts)
    encode.check_finite(result, "queries")
    return result


def _is_same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules are interchangeable; False too where that cannot be seen."""
    return (
        type(ours) is type(theirs)
        and encode.settings_of(ours) == encode.settings_of(theirs)
        and encode.tokenizer_of(ours) == encode.tokenizer_of(theirs) != ""
        and _same_weights(ours, theirs)
    )


def _same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, others = ours.state_dict(), theirs.state_dict()
    return mine.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor.cpu(), others[name].cpu())
        for name, tensor in mine.items()
    )


def _is_scale_free(module: nn.Module) -> bool:
    """Whether a longer input only makes a longer output, which the normalisation at the end takes away."""
    from sentence_transformers.base.modules import Dense

    return (
        isinstance(module, Dense)
        and module.linear.bias is None
        and isinstance(module.activation_function, nn.Identity)
    )
